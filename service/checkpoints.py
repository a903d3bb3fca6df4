"""Checkpoints of a run: taken by all processes together, written by one, published whole or not.

The training thread copies the state into a kept buffer and goes on; a thread beside it writes,
syncs and publishes.  It is a thread and not a process, for it dies with the process whose state it
writes; writing, hashing and syncing leave the interpreter alone.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from service.checkpoint_files import (
    BEST,
    Checkpoint,
    best_of,
    checkpoints_in,
    damage_of,
    in_words,
    kept,
    name_of,
    read_manifest,
    read_state,
    tensor_digests,
    write_into,
)
from service.durable import (
    PASSING,
    in_the_way,
    kind_of,
    make_directory,
    remove,
    remove_if_possible,
    replace_file,
    sync_directory,
)
from service.errors import Diverged, EvenstepError, NoCheckpoint, NotSaved, SpecError
from service.pulse import WRITER, Pulse
from service.snapshots import Content, Snapshot, content_of, load, require_finite
from service.spec import CheckpointSpec
from service.state import TrainState
from service.stopping import Stopping
from service.world import World

_LOOK_SECONDS = 0.25
_PIECE_BYTES = 64 << 20
"""So much is written between two signs that the writer gets on."""


class Record(Protocol):
    """What is kept beside the checkpoints, step by step."""

    def sync(self) -> None:
        """Return when it is on disk, up to the step that was written last."""


class Seal(Protocol):
    """Takes note of what is saved."""

    def __call__(self, step: int, files: Mapping[str, str]) -> None:
        """The SHA-256 of each tensor file of the checkpoint that is about to be published."""


@dataclass(frozen=True)
class _Job:
    """One save, as the writer gets it."""

    content: Content
    arrived: torch.cuda.Event | None
    """When the content has come from the device; None where it is here."""
    records: Sequence[Record]
    seal: Seal | None
    began: float

    @property
    def step(self) -> int:
        return int(self.content.rest["step"])

    @property
    def untested(self) -> bool:
        return self.content.rest["untested"] is not None

    @property
    def best(self) -> int | None:
        best = self.content.rest["best"]
        return best["step"] if best else None


class Checkpoints:
    """The checkpoints of one run.  Every process calls the methods; the lead writes."""

    def __init__(
        self,
        directory: Path,
        *,
        world: World,
        spec: CheckpointSpec,
        facts: Mapping[str, Any],
        say: Callable[[str], None],
        rename: Mapping[str, str] | None = None,
        pulse: Pulse | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        """`facts` go into every manifest: what the run is and on how many processes.

        `pulse` is told that a save gets on, and how long it took, as is `stopping`.  `rename`
        gives the new names of parameters and modules that are saved under old ones.
        """
        self._directory = directory
        self._world = world
        self._spec = spec
        self._facts = dict(facts)
        self._say = say
        self._rename = rename or {}
        self._pulse = pulse or Pulse()
        self._stopping = stopping or Stopping((), say=say)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=WRITER)
        self._moves = 0
        """Counts what the writer has got done."""
        self._snapshot = Snapshot(world.device)
        self._pending: Future[None] | None = None
        self._unsaved: EvenstepError | None = None
        """Why the last save failed, where the run went on all the same."""
        self._failures = 0
        self._timings: dict[str, float] = {}
        self._durable: SimpleQueue[float] = SimpleQueue()
        self._reserved: Future[None] | None = None

    def reserve(self, expected_bytes: int | None) -> None:
        """Get the memory for copies, beside the first steps: to touch it costs more than to copy.

        Where the size of a state is not known beforehand, the first save does it.
        """
        if self._world.is_lead and self._spec.asynchronous and expected_bytes is not None:
            self._reserved = self._writer.submit(self._snapshot.reserve, expected_bytes)

    # ---- save

    def save(
        self, state: TrainState, *, records: Sequence[Record] = (), seal: Seal | None = None
    ) -> None:
        """Save the state as it is now; on disk when the next `save` or `finish` returns.

        With `checkpoint.asynchronous: false`, on disk when this returns.  The records are on disk
        before the checkpoint is there.

        Raises:
            EvenstepError: the save before this one, or this one where it is not asynchronous,
                failed; on every process, and the checkpoints before it are as they were.
        """
        began = time.perf_counter()
        self._settle()  # a later save waits for the earlier
        self._unsaved = None
        places = self._world.gather(state.stream.place()) if state.stream else None
        if self._world.is_lead:
            self._pending = self._begin(state, places, records, seal, began)
        if not self._spec.asynchronous:
            self._settle()
        self._timings["save/stall_seconds"] = time.perf_counter() - began

    def finish(self) -> None:
        """Return when the last save is on disk; it is what the run comes to, so it may not fail.

        Raises:
            EvenstepError: it failed, on every process.
        """
        self._settle()
        if self._unsaved is not None:
            raise self._unsaved

    def close(self) -> None:
        """Let the writer end what it has begun.  Asks no other process: they may be gone."""
        if self._pending is not None:
            self._wait_for(self._pending)
        self._writer.shutdown(wait=True)

    def timings(self) -> dict[str, float]:
        """What the last save took, each figure once: for the next row of the metrics."""
        while not self._durable.empty():
            self._timings["save/durable_seconds"] = self._durable.get()
        if self._failures:
            self._timings["save/failures"] = self._failures
        values, self._timings = self._timings, {}
        return values

    def _begin(
        self,
        state: TrainState,
        places: list[dict[str, Any]] | None,
        records: Sequence[Record],
        seal: Seal | None,
        began: float,
    ) -> Future[None]:
        """The save under way, or done, or failed: `_settle` finds out."""
        begun: Future[None] = Future()
        try:
            content, arrived = self._copied(content_of(state, places))
            job = _Job(content, arrived, records, seal, began)
            if self._spec.asynchronous:
                return self._writer.submit(self._carry_out, job)
            self._carry_out(job)
            begun.set_result(None)
        except EvenstepError as error:
            begun.set_exception(error)
        return begun

    def _copied(self, content: Content) -> tuple[Content, torch.cuda.Event | None]:
        if not self._spec.asynchronous:
            return content, None
        try:
            if self._reserved is not None:
                self._reserved.result()
            return self._snapshot.take(content)
        except RuntimeError as error:  # what torch raises where memory is short
            raise NotSaved(
                f"The state after step {content.rest['step']} could not be copied: {error}. "
                f"It takes {in_words(content.size_bytes)} of main memory besides; "
                "checkpoint.asynchronous=false takes none."
            ) from error

    def _settle(self) -> None:
        """Wait for the save under way; where it failed, fail together or go on, as the spec says.

        Raises:
            EvenstepError: it failed and the run is to stop, or the state is not worth saving.
        """
        pending, self._pending = self._pending, None
        failed: EvenstepError | None = None
        if pending is not None:
            self._wait_for(pending)
            try:
                pending.result()
            except EvenstepError as error:
                failed = error
        failed = self._world.from_lead(failed)
        if failed is None:
            return
        self._failures += 1
        if self._spec.on_failure == "stop" or isinstance(failed, Diverged):
            raise failed
        self._unsaved = failed
        self._say(f"WARNING: {failed} Training goes on (checkpoint.on_failure: go_on).")

    def _wait_for(self, pending: Future[None]) -> None:
        """Return when it is done; for as long as the writer gets on, this is no standing still."""
        seen = self._moves
        while wait([pending], timeout=_LOOK_SECONDS).not_done:
            if seen != self._moves:
                seen = self._moves
                self._pulse.moved()

    # ---- what the writer does: on the lead, beside training; no other process is asked

    def _carry_out(self, job: _Job) -> None:
        if job.arrived is not None:
            job.arrived.synchronize()
        require_finite(job.content)
        try:
            self._publish(job)
        except OSError as error:
            raise _not_saved(job.step, self._directory, error) from error
        seconds = time.perf_counter() - job.began
        self._durable.put(seconds)
        self._pulse.longest_save_seconds = max(self._pulse.longest_save_seconds, seconds)
        self._stopping.learned(seconds, "as measured in this run")

    def _publish(self, job: _Job) -> None:
        make_directory(self._directory)
        self._sweep()
        target = Checkpoint(self._directory / name_of(job.step, untested=job.untested), job.step)
        if os.path.lexists(target.path) and damage_of(target) is not None:
            self._set_aside(target)
        if not os.path.lexists(target.path):
            self._write(job, target)
        self._prune(job.best)
        self._mark_best(job.best)

    def _write(self, job: _Job, target: Checkpoint) -> None:
        self._require_room(job)
        partial = self._directory / f".{target.path.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        content = job.content
        try:
            write_into(
                partial,
                {
                    file: (content.entries(file), self._getting_on(content.pieces(file)))
                    for file in content.tensors
                },
                content.rest,
                {"time": time.time(), **self._facts},
            )
            self._get_on()
            if job.seal is not None:
                job.seal(job.step, tensor_digests(read_manifest(Checkpoint(partial, job.step))))
            # A checkpoint that outlived the machine without the rows before it would be a gap.
            for record in job.records:
                record.sync()
                self._get_on()
            os.rename(partial, target.path)
        except BaseException:
            remove_if_possible(partial)
            raise
        sync_directory(self._directory)
        self._get_on()

    def _getting_on(self, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """The same bytes; the next are asked for when the ones before are written."""
        for piece in pieces:
            for start in range(0, len(piece), _PIECE_BYTES):
                yield piece[start : start + _PIECE_BYTES]
                self._get_on()

    def _get_on(self) -> None:
        self._moves += 1
        if not self._spec.asynchronous:  # else it is another thread that tells where it is
            self._pulse.moved()

    def _require_room(self, job: _Job) -> None:
        needed = job.content.size_bytes
        free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise NotSaved(
                f"The checkpoint of step {job.step} could not be written to {self._directory}: it "
                f"needs {in_words(needed)} and {in_words(free)} are free. Earlier ones are "
                "untouched. Free some, or lower checkpoint.keep."
            )

    def _prune(self, best: int | None) -> None:
        found = checkpoints_in(self._directory)
        stay = kept(
            [checkpoint.step for checkpoint in found],
            newest=self._spec.keep,
            every=self._spec.keep_every_steps,
            best=best,
        )
        tested = {checkpoint.step for checkpoint in found if not checkpoint.untested}
        for old in found:
            if old.step not in stay or (old.untested and old.step in tested):
                # First out of sight, in one piece: half a checkpoint would look like a damaged one.
                gone = old.path.with_name(f".{old.path.name}.removed-{secrets.token_hex(4)}")
                os.rename(old.path, gone)
                remove(gone)
                self._get_on()

    def _mark_best(self, best: int | None) -> None:
        if best is None or best == best_of(self._directory):
            return
        if (self._directory / name_of(best)).is_dir():
            replace_file(self._directory / BEST, name_of(best) + "\n")

    def _sweep(self) -> None:
        """Remove what a process that was killed left half-written or half-removed."""
        for pattern in (".step-*.partial-*", ".step-*.removed-*"):
            for leftover in self._directory.glob(pattern):
                remove(leftover)
                self._get_on()

    def _set_aside(self, damaged: Checkpoint) -> None:
        aside = f".damaged-{damaged.path.name}-{secrets.token_hex(2)}"
        os.rename(damaged.path, damaged.path.with_name(aside))

    # ---- restore

    def restore(self, state: TrainState) -> bool:
        """Put the newest good checkpoint into `state`; False where there is none yet.

        Raises:
            NoCheckpoint: there are some, and none is good.
            SpecError: it does not fit the model, the optimizer or the data.
        """
        chosen: tuple[str, int, str] | None = None
        failed: EvenstepError | None = None
        if self._world.is_lead:
            try:
                chosen = self._choose()
            except EvenstepError as error:
                failed = error
        self._world.fail_together(failed)
        # One process chooses: two that fell back differently would train two models.
        chosen = self._world.from_lead(chosen)
        if chosen is None:
            return False
        try:
            self._load(*chosen, state)
        except EvenstepError as error:
            failed = error
        self._world.fail_together(failed)
        return True

    def _choose(self) -> tuple[str, int, str] | None:
        """Name, step and hash of the newest good checkpoint; clears up around it."""
        try:
            if os.path.lexists(self._directory) and not self._directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._sweep()
            newest = self._newest_good()
            if newest is None:
                return None
            manifest = read_manifest(newest)
            self._require_same_rows(newest, manifest)
            best = read_state(newest.path)["best"]
            self._mark_best(best["step"] if best else None)
            return newest.path.name, newest.step, str(manifest["sha256"])
        except OSError as error:
            kind = EvenstepError if error.errno in PASSING else SpecError
            named = f" ({error.filename})" if error.filename else ""
            raise kind(
                f"The checkpoints in {self._directory} cannot be used: "
                f"{error.strerror or error}{named}."
            ) from error

    def _newest_good(self) -> Checkpoint | None:
        found = checkpoints_in(self._directory)
        damaged: list[Checkpoint] = []
        for checkpoint in reversed(found):
            damage = damage_of(checkpoint)
            if damage is None:
                for broken in damaged:
                    self._set_aside(broken)
                return checkpoint
            self._say(
                f"WARNING: checkpoint {checkpoint.path} is damaged: {damage}. It is not used; "
                "trying the one before."
            )
            damaged.append(checkpoint)
        if found:
            # They stay where they are: the next attempt must not take this for a new run.
            raise NoCheckpoint(
                f"None of the {len(found)} checkpoints in {self._directory} can be read. "
                "Put a good copy back, or begin again with --fresh."
            )
        return None

    def _require_same_rows(self, checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> None:
        before, now = manifest.get("train_rows"), self._facts.get("train_rows")
        if before is not None and now is not None and before != now:
            raise SpecError(
                f"{checkpoint.path} was trained on {before} rows, and the data set now has {now}. "
                "Give it the data it began with, or begin again with --fresh."
            )

    def _load(self, name: str, step: int, sha256: str, state: TrainState) -> None:
        chosen = Checkpoint(self._directory / name, step)
        if read_manifest(chosen)["sha256"] != sha256:
            raise NoCheckpoint(
                f"Process {self._world.index} finds another checkpoint in {chosen.path} than the "
                "first process does. Give all of them the same storage."
            )
        load(chosen.path, state, index=self._world.index, rename=self._rename)


def _not_saved(step: int, directory: Path, error: OSError) -> EvenstepError:
    """An error of the operating system in words."""
    where = ""
    if error.filename is not None and directory not in Path(error.filename).parents:
        where = f"{error.filename}, which belongs to it: "  # a record of the steps before it
    return kind_of(error)(
        f"The checkpoint of step {step} could not be written to {directory}: "
        f"{where}{in_the_way(error)}. Earlier ones are untouched."
    )
