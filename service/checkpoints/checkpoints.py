"""Saves and restores the checkpoints of a run, by all processes together.

The training thread copies the state into a reused buffer and continues; a background thread writes,
syncs and publishes it.  What changes in an update only is copied while the next pass runs, by the
background thread if it is sharded, or by a device; the next update waits for that.  The writer is a
thread and not a process, so it ends with the process whose state it writes; writing, hashing and
syncing do not hold the interpreter's lock.
A large state is shared: each process of rank 0's node copies and writes its parts of the files,
and rank 0 publishes the checkpoint after all parts are on disk.  If each process has only some
rows, all of them write; on nodes that share no disk, those of other nodes send their rows to
processes of rank 0's node.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from service.basics.atomic_files import (
    Hashes,
    in_the_way,
    kind_of,
    kind_of_unread,
    make_directory,
    remove_if_possible,
    replace_file,
    sync_directory,
)
from service.basics.errors import (
    Diverged,
    EvenstepError,
    NoCheckpoint,
    NotSaved,
    PeerLost,
    SpecError,
    WillFailAgain,
    with_place,
)
from service.basics.limits import limits, threads_each
from service.basics.multipart import (
    PART_BYTES,
    Part,
    hash_parts,
    write_parts,
    write_pieces,
)
from service.checkpoints.pending_copies import LateCopies
from service.checkpoints.shards import (
    Shard,
    ShardLayout,
    Snapshot,
    most_shares,
    require_finite,
    shard_by_rows,
)
from service.checkpoints.snapshots import Content, content_of, load
from service.distributed.devices import use
from service.distributed.world import Piece, World, Writers
from service.health.heartbeat import WRITER, Heartbeat
from service.health.stop_budget import StopBudget
from service.optimization.train_state import TrainState
from service.runs.checkpoint_files import (
    BEST,
    Checkpoint,
    Share,
    apparent_damage_of,
    best_of,
    checkpoints_in,
    complete,
    damage_of,
    find_checkpoint,
    in_words,
    kept,
    name_of,
    read_manifest,
    read_state,
    tensor_digests,
)
from service.sharding.sharding import holds_rows
from service.spec.models import CheckpointSpec

Bytes = tuple[str, int, Iterator[memoryview]]
"""A file, a position in it, and what is to be written there."""


class Record(Protocol):
    """A file with rows of each step that must be on disk before a checkpoint is published."""

    def sync(self) -> None:
        """Return when all rows written so far are on disk."""


class Seal(Protocol):
    """Records the hashes of a checkpoint."""

    def __call__(self, step: int, files: Mapping[str, str]) -> None:
        """Called before a checkpoint is published, with the SHA-256 of each tensor file."""


@dataclass(frozen=True)
class _Job:
    """One save, as the writer thread of one process receives it."""

    content: Content | Shard
    """The whole state, or the shard of this process if the save is shared."""
    rest: Mapping[str, Any]
    size_bytes: int
    """Size of the whole state."""
    arrived: LateCopies | None
    """The copies to wait for, if any."""
    failed: EvenstepError | None
    """Why this process has nothing to write."""
    records: Sequence[Record]
    seal: Seal | None
    began: float

    @property
    def is_shared(self) -> bool:
        """Whether several processes write this save."""
        return isinstance(self.content, Shard)

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return int(self.rest["step"])

    @property
    def untested(self) -> bool:
        """Whether the test of this step was abandoned."""
        return self.rest["untested"] is not None

    @property
    def best(self) -> int | None:
        """The step of the best measure."""
        return next(iter(self.bests), None)

    @property
    def bests(self) -> list[int]:
        """The steps of the best measures, the best one first."""
        best = self.rest["best"]
        return [each["step"] for each in (best, *self.rest["runners_up"])] if best else []


class Checkpoints:
    """The checkpoints of one run.  Every process calls the methods; rank 0 publishes."""

    def __init__(
        self,
        directory: Path,
        *,
        world: World,
        spec: CheckpointSpec,
        facts: Mapping[str, Any],
        say: Callable[[str], None],
        heartbeat: Heartbeat | None = None,
        stopping: StopBudget | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """`facts` are written to every manifest: the run, and its number of processes.

        `heartbeat` gets the progress of saves; it and `stopping` get their duration.  A state
        of few parts is written by rank 0 alone.
        """
        self._directory = directory
        self._world = world
        self._by_rows = False
        self._at_disk = world.processes
        """How many processes, the first ones, have the disk on which a sharded state is written."""
        self._part_bytes = part_bytes
        self._spec = spec
        self._facts = dict(facts)
        self._say = say
        self._rename = spec.rename
        self._heartbeat = heartbeat or Heartbeat()
        self._stopping = stopping or StopBudget((), say=say)
        self._trainer: int | None = None
        self._writer = ThreadPoolExecutor(
            1, WRITER, initializer=_begin_writing, initargs=(world.device,)
        )
        self._snapshot = Snapshot(world.device)
        self._pending: Future[None] | EvenstepError | None = None
        """The current save, or why it could not begin; None if there is nothing to wait for."""
        self._unsaved: EvenstepError | None = None
        """Why the last save failed, if the run continued."""
        self._failures = 0
        self._timings: dict[str, float] = {}
        self._durable: SimpleQueue[float] = SimpleQueue()
        self._reserved: Future[None] | None = None
        self._pending_copies: LateCopies | None = None
        """The copies of the current save that an update must wait for."""

    @property
    def _writers(self) -> Writers:
        """The processes that write together; all processes make the first access (a collective)."""
        return self._world.writers(everyone=self._by_rows)

    def reserve(self, expected_bytes: int | None) -> None:
        """Allocate the buffer for copies during the first steps: this is slower than copying.

        If the size of the state is not known yet, the first save allocates it.
        """
        if not self._spec.asynchronous or expected_bytes is None:
            return
        processes = self._writers_of(expected_bytes)
        if processes > 1:  # a share exceeds the mean by at most two parts
            expected_bytes = expected_bytes // processes + 2 * self._part_bytes
        if self._world.index < processes:
            self._reserved = self._writer.submit(self._snapshot.reserve, expected_bytes)

    # ---- save

    def save(
        self, state: TrainState, *, records: Sequence[Record] = (), seal: Seal | None = None
    ) -> None:
        """Save the current state; it is on disk when the next `save` or `finish` returns.

        With `checkpoint.asynchronous: false`, it is on disk when this returns.  The records are on
        disk before the checkpoint exists.

        Raises:
            EvenstepError: the previous save, or this one if it is not asynchronous, failed;
                raised on every process. Earlier checkpoints are unchanged.
        """
        began = time.perf_counter()
        self._trainer = threading.get_ident()
        self._know(state)
        self._settle()  # a save waits for the previous one
        self._unsaved = None
        self._pending_copies = None
        places = self._world.gather(state.stream.place()) if state.stream else None
        try:
            if self._world.index < self._writers.processes:
                self._pending = self._begin(state, places, records, seal, began)
            elif not self._writers.have_met and self._is_shared(content_of(state, places)):
                self._writers.meet()
        except EvenstepError as error:
            self._pending = error
        if not self._spec.asynchronous:
            self._settle()
        self._timings["save/stall_seconds"] = time.perf_counter() - began
        if self._pending_copies is not None:
            state.before_update = self._finish_copies

    def finish(self) -> None:
        """Return when the last save is on disk; it holds the result, so it must not fail.

        Raises:
            EvenstepError: it failed, on every process.
        """
        self._settle()
        if self._unsaved is not None:
            raise self._unsaved

    def _finish_copies(self) -> None:
        """Return when all of the state is copied, which an update is about to change."""
        copies, self._pending_copies = self._pending_copies, None
        if copies is None:
            return
        began = time.perf_counter()
        with self._heartbeat.waiting_for_the_writer():
            copies.permit_change()
        stalled = self._timings.get("save/stall_seconds", 0.0)
        self._timings["save/stall_seconds"] = stalled + time.perf_counter() - began

    def close(self) -> None:
        """Let the writer finish its save.  It gets an error if other processes are gone."""
        if isinstance(self._pending, Future):
            self._heartbeat.enter("save")
            self._wait_for(self._pending)
        self._writer.shutdown(wait=True)

    def timings(self) -> dict[str, float]:
        """The durations of the last save, each returned once, for the next row of the metrics."""
        while not self._durable.empty():
            self._timings["save/durable_seconds"] = self._durable.get()
        if self._failures:
            self._timings["save/failures"] = self._failures
        values, self._timings = self._timings, {}
        return values

    def _know(self, state: TrainState) -> None:
        """If each process has only some rows, all processes write."""
        if not self._by_rows and holds_rows(state.model):
            self._by_rows = True
            if self._world.own_disks:
                self._at_disk = self._world.writers().processes

    def _begin(
        self,
        state: TrainState,
        places: list[dict[str, Any]] | None,
        records: Sequence[Record],
        seal: Seal | None,
        began: float,
    ) -> Future[None] | None:
        """Start the save, or carry it out; `_settle` waits for what this returns."""
        content = content_of(state, places)
        is_shared = self._is_shared(content)
        if not (self._world.is_lead or is_shared):
            return None
        if is_shared:
            self._writers.meet()
        job = self._job(content, is_shared, records, seal, began)
        if self._spec.asynchronous:
            return self._writer.submit(self._carry_out, job)
        self._carry_out(job)
        return None

    def _job(
        self,
        content: Content,
        is_shared: bool,
        records: Sequence[Record],
        seal: Seal | None,
        began: float,
    ) -> _Job:
        held: Content | Shard = content
        arrived: LateCopies | None = None
        failed: EvenstepError | None = None
        if content.is_sharded:
            held = shard_by_rows(
                content,
                index=self._writers.index,
                hashing=self._at_disk,
                part_bytes=self._part_bytes,
            )
        elif is_shared:
            held = self._layout(content).shard(self._writers.index)
        if self._spec.asynchronous:
            try:
                held, arrived = self._copied(held)
                self._pending_copies = arrived
            except EvenstepError as error:
                failed = error  # the other processes wait for this report
        return _Job(held, content.rest, content.size_bytes, arrived, failed, records, seal, began)

    def _layout(self, content: Content) -> ShardLayout:
        writers = self._writers.processes
        return ShardLayout(
            content, processes=writers, streams=self._streams(), part_bytes=self._part_bytes
        )

    def _is_shared(self, content: Content) -> bool:
        return self._writers_of(content.size_bytes) > 1

    def _writers_of(self, size_bytes: int) -> int:
        """How many processes write a state of this size."""
        if self._by_rows:
            return self._writers.processes
        return min(self._writers.processes, most_shares(size_bytes, self._part_bytes))

    def _streams(self) -> int:
        """Two if one process writes everything and a core is free for the second."""
        training = torch.get_num_threads() if self._world.device.type == "cpu" else 1
        busy = training if self._spec.asynchronous else 0
        return 2 if self._writers.processes == 1 and limits().cores - busy >= 2 else 1

    def _copied(self, content: Content | Shard) -> tuple[Content | Shard, LateCopies]:
        try:
            reserved, self._reserved = self._reserved, None
            if reserved is not None:
                wait([reserved])  # if it failed, the copy tries again
            if isinstance(content, Shard):
                return self._snapshot.part(content)
            return self._snapshot.whole(content)
        except RuntimeError as error:  # torch raises this if memory is short
            raise NotSaved(
                f"The state after step {content.rest['step']} could not be copied: {error}. "
                f"It takes {in_words(content.size_bytes)} of additional main memory; "
                "checkpoint.asynchronous=false takes none."
            ) from error

    def _settle(self) -> None:
        """Wait for the current save; if it failed, fail on all processes or continue, as specified.

        Raises:
            EvenstepError: it failed and the run must stop, or the state is not finite.
        """
        pending, self._pending = self._pending, None
        failed = pending if isinstance(pending, EvenstepError) else None
        if isinstance(pending, Future):
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
        self._say(f"WARNING: {failed} Training continues (checkpoint.on_failure: go_on).")

    def _wait_for(self, pending: Future[Any]) -> None:
        """Return when it is done; while the writer makes progress, this is not a hang."""
        if threading.get_ident() == self._trainer:
            with self._heartbeat.waiting_for_the_writer():
                wait([pending])
        else:
            wait([pending])

    # ---- the writer thread: parallel to training; communicates with other writers only

    def _carry_out(self, job: _Job) -> None:
        with self._heartbeat.saving():
            if job.arrived is not None:  # training may already wait for them
                job.arrived.make()
            self._save(job)

    def _save(self, job: _Job) -> None:
        shard = job.content
        if isinstance(shard, Content):  # otherwise it was divided before it was copied
            shard = self._layout(shard).shard(self._writers.index)
        if not self._world.is_lead:
            place = self._writers.from_lead(None)
            self._get_on()
            if place is not None:
                self._write(job, shard, place)
            return
        try:
            self._publish(job, shard)
        except OSError as error:
            raise _not_saved(job.step, self._directory, error) from error
        seconds = time.perf_counter() - job.began
        self._durable.put(seconds)
        self._heartbeat.longest_save_seconds = max(self._heartbeat.longest_save_seconds, seconds)
        self._stopping.learned(seconds, "as measured in this run")

    def _publish(self, job: _Job, shard: Shard) -> None:
        target = Checkpoint(self._directory / name_of(job.step, untested=job.untested), job.step)
        partial: Path | None = None
        try:
            partial = self._prepared(job, shard, target)
        finally:  # the other writers learn the path, or that there is none
            if job.is_shared:
                self._writers.from_lead(partial)
        if partial is not None:
            try:
                self._make(job, shard, partial, target)
            except BaseException:
                remove_if_possible(partial)
                raise
            sync_directory(self._directory)
            self._get_on()
        self._prune(job.bests)
        self._get_on()
        self._mark_best(job.best)

    def _prepared(self, job: _Job, shard: Shard, target: Checkpoint) -> Path | None:
        """A new directory to write into; None if the checkpoint already exists."""
        _require_fit(job, shard)
        make_directory(self._directory)
        self._sweep()
        if os.path.lexists(target.path) and damage_of(target) is not None:
            self._set_aside(target)
        if os.path.lexists(target.path):
            return None
        self._require_room(job)
        partial = self._directory / f".{target.path.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        return partial

    def _make(self, job: _Job, shard: Shard, partial: Path, target: Checkpoint) -> None:
        """Let all writers fill `partial`, then publish it as the checkpoint `target`."""
        complete(
            partial,
            self._write(job, shard, partial),
            job.rest,
            {"time": time.time(), **self._facts},
            part_bytes=self._part_bytes,
            moved=self._get_on,
        )
        if job.seal is not None:
            job.seal(job.step, tensor_digests(read_manifest(Checkpoint(partial, job.step))))
        # After a power loss, a checkpoint without its earlier rows would leave a gap.
        for record in job.records:
            record.sync()
            self._get_on()
        os.rename(partial, target.path)

    def _write(self, job: _Job, shard: Shard, partial: Path) -> dict[Part, Hashes]:
        """Write the parts of this process; return the hashes of all parts, when all are on disk.

        Raises:
            EvenstepError: a process could not write its parts; with the message of the first.
        """
        if not shard.by_rows:
            return self._together(job, shard, lambda: self._written(job, shard, partial))
        self._together(job, shard, lambda: self._rows_written(job, shard, partial))
        [parts] = shard.shares

        def hashed() -> dict[Part, Hashes]:
            return hash_parts(partial, parts, moved=self._get_on)

        return self._together(job, shard, hashed)

    def _together(
        self, job: _Job, shard: Shard, act: Callable[[], dict[Part, Hashes]]
    ) -> dict[Part, Hashes]:
        """The combined results of `act` on each process that writes.

        Raises:
            EvenstepError: it failed on one of them; with the message of the first.
        """
        own: dict[Part, Hashes] = {}
        failed: EvenstepError | None = None
        try:
            own = act()
        except EvenstepError as error:
            failed = error
        except OSError as error:
            failed = _not_saved(job.step, self._directory, error)
        except Exception as error:
            if job.is_shared:  # the other processes wait for this report
                lost = PeerLost(
                    f"Process {self._world.index} could not write its share of the checkpoint of "
                    f"step {job.step}: {with_place(error)}. Earlier ones are unchanged."
                )
                self._writers.gather((lost, shard.layout, own))
            raise
        answer = (failed, shard.layout, own)
        told = self._writers.gather(answer) if job.is_shared else [answer]
        self._get_on()  # the wait for the others does not count towards a hang
        digests: dict[Part, Hashes] = {}
        for index, (failed, layout, parts) in enumerate(told):
            if failed is not None:
                raise failed
            if layout != shard.layout:
                raise WillFailAgain(
                    f"Process {index} has other tensors than process {self._world.index}: their "
                    "names, types or shapes differ, so the state is not saved. Make the model and "
                    "its optimizer the same on every process."
                )
            digests |= parts
        return digests

    def _rows_written(self, job: _Job, shard: Shard, partial: Path) -> dict[Part, Hashes]:
        """Returns an empty result when the rows of this process are on disk."""
        if self._writers.index >= self._at_disk:
            return self._rows_sent(job, shard)
        arriving = self._arriving(shard)
        try:
            if not self._world.is_lead:  # rank 0 has checked before it created the directory
                _require_fit(job, shard)
            own = shard.pieces(with_heads=self._world.is_lead)
            # In turn, so that no process waits long without progress.
            write_pieces(partial, in_turn([own, *arriving]), moved=self._get_on)
        finally:
            for rows in arriving:  # whoever sends them waits until they are taken
                for _ in rows:
                    self._get_on()
        return {}

    def _rows_sent(self, job: _Job, shard: Shard) -> dict[Part, Hashes]:
        """The same for a process of another node, whose disk is another one."""
        rows: Iterable[Piece] = ()
        try:
            _require_fit(job, shard)
            rows = shard.own_bytes()
        finally:  # the process that receives them waits for the last, also if there are none
            to = self._writers.index % self._at_disk
            self._writers.send(rows, to=to, moved=self._get_on)
        return {}

    def _arriving(self, shard: Shard) -> list[Iterator[Bytes]]:
        """The rows that each of some processes of other nodes sends to this one."""
        files = list(shard.heads)

        def sent(origin: int) -> Iterator[Bytes]:
            for number, begin, blocks in self._writers.receive(origin):
                yield files[number], begin, blocks

        first = self._at_disk + self._writers.index
        return [sent(each) for each in range(first, self._writers.processes, self._at_disk)]

    def _written(self, job: _Job, shard: Shard, partial: Path) -> dict[Part, Hashes]:
        if not self._world.is_lead:  # rank 0 has checked before it created the directory
            _require_fit(job, shard)

        def write(share: set[Part]) -> dict[Part, Hashes]:
            return write_parts(partial, share, shard.bytes_of, moved=self._get_on)

        shares = shard.shares  # empty if there are more processes than parts
        digests: dict[Part, Hashes] = {}
        with _writer_threads(max(1, len(shares) - 1), self._world.device) as beside:
            writing = [beside.submit(write, share) for share in shares[1:]]
            for share in shares[:1]:
                digests |= write(share)
            for written in writing:
                self._wait_for(written)
                digests |= written.result()
        return digests

    def _get_on(self) -> None:
        """Report the progress of a save."""
        if threading.get_ident() == self._trainer:
            self._heartbeat.moved()
        self._heartbeat.writer_moved()

    def _require_room(self, job: _Job) -> None:
        needed = job.size_bytes
        free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise NotSaved(
                f"The checkpoint of step {job.step} could not be written to {self._directory}: it "
                f"needs {in_words(needed)} and {in_words(free)} are free. Earlier ones are "
                "unchanged. Free some, or lower checkpoint.keep."
            )

    def _prune(self, best: Collection[int]) -> None:
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
                try:
                    self._remove(old.path)
                except OSError as error:  # the new one is saved all the same
                    self._say(f"WARNING: {old.path} could not be removed: {in_the_way(error)}.")

    def _mark_best(self, best: int | None) -> None:
        if best is None or best == best_of(self._directory):
            return
        if (self._directory / name_of(best)).is_dir():
            replace_file(self._directory / BEST, name_of(best) + "\n")

    def _sweep(self) -> None:
        """Remove the incomplete directories of killed processes."""
        for partial in list(self._directory.glob(".step-*.partial-*")):
            self._remove(partial)
        for leftover in self._directory.glob(".step-*.removed-*"):
            remove_if_possible(leftover)
            self._get_on()

    def _remove(self, path: Path) -> None:
        """Rename it first: a half-deleted checkpoint would look like a damaged one.

        The writer of a killed job that is still running does not find it any more, either. What
        cannot be removed now (on NFS, while another process has a file of it open) is removed by a
        later `_sweep`.
        """
        gone = path.with_name(f".{path.name.lstrip('.')}.removed-{secrets.token_hex(4)}")
        os.rename(path, gone)
        remove_if_possible(gone)
        self._get_on()

    def _set_aside(self, damaged: Checkpoint) -> None:
        aside = f".damaged-{damaged.path.name}-{secrets.token_hex(2)}"
        os.rename(damaged.path, damaged.path.with_name(aside))

    # ---- restore

    def restore(self, state: TrainState) -> bool:
        """Load the newest valid checkpoint into `state`; False if there is none yet.

        Raises:
            NoCheckpoint: there are checkpoints, but none is valid.
            SpecError: it does not fit the model, the optimizer or the data.
        """
        self._trainer = threading.get_ident()
        self._know(state)
        damaged: list[Checkpoint] = []
        chosen = self._newest_good(damaged)
        if chosen is None:
            return False
        failed: EvenstepError | None = None
        try:
            if self._world.is_lead:
                with self._told_as_unusable():
                    self._enter(chosen, damaged)
            load(chosen.path, state, index=self._world.index, rename=self._rename)
        except EvenstepError as error:
            failed = error
        self._world.fail_together(failed)
        return True

    def _newest_good(self, damaged: list[Checkpoint]) -> Checkpoint | None:
        """The newest valid checkpoint; the processes that write to its disk verify it together.

        Args:
            damaged: receives newer ones that are damaged.
        Raises:
            EvenstepError: they cannot be used; on every process.
        """
        share = self._share()
        while True:
            # One process chooses, because two different choices would train two models.
            proposed = self._proposed(damaged) if self._world.is_lead else (None, None)
            failed, candidate = self._world.from_lead(proposed)
            if failed is not None:
                raise failed
            if candidate is None:
                return None
            name, step, sha256 = candidate
            chosen = Checkpoint(self._directory / name, step)
            answers = self._world.gather(self._verified(chosen, sha256, share))
            for failed, _ in answers:
                if failed is not None:
                    raise failed
            damage = next((damage for _, damage in answers if damage is not None), None)
            if damage is None:
                return chosen
            damaged.append(self._reported(chosen, damage))

    def _share(self) -> Share | None:
        """What this process verifies; None if it does not write to the disk of rank 0."""
        count = min(self._writers.processes, self._at_disk)
        if self._world.index >= count:
            return None
        here = min(count, self._world.processes_here)
        return Share(self._world.index, count, threads_each(here))

    def _proposed(
        self, damaged: list[Checkpoint]
    ) -> tuple[EvenstepError | None, tuple[str, int, str] | None]:
        """Why none can be used, or name, step and hash of the next one; None if there is none."""
        try:
            with self._told_as_unusable():
                return None, self._next(damaged)
        except EvenstepError as error:
            return error, None

    def _next(self, damaged: list[Checkpoint]) -> tuple[str, int, str] | None:
        """The newest that is not known to be damaged; removes incomplete ones."""
        if os.path.lexists(self._directory) and not self._directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._sweep()
        found = checkpoints_in(self._directory)
        for checkpoint in reversed(found):
            if checkpoint in damaged:
                continue
            damage = apparent_damage_of(checkpoint)
            if damage is not None:
                damaged.append(self._reported(checkpoint, damage))
                continue
            manifest = read_manifest(checkpoint)
            self._require_same_rows(checkpoint, manifest)
            return checkpoint.path.name, checkpoint.step, str(manifest["sha256"])
        if found:
            # They are not renamed: the next attempt must not take this for a new run.
            raise NoCheckpoint(
                f"None of the {len(found)} checkpoints in {self._directory} can be read. "
                "Restore a good copy, or start over with --fresh."
            )
        return None

    def _verified(
        self, chosen: Checkpoint, sha256: str, share: Share | None
    ) -> tuple[EvenstepError | None, str | None]:
        """Why this process cannot use the checkpoint, and its damage in this process's share."""
        try:
            _require_that(chosen, sha256, self._world)
            with self._told_as_unusable():
                return None, damage_of(chosen, share, quick=True) if share else None
        except EvenstepError as error:
            return error, None

    def _reported(self, checkpoint: Checkpoint, damage: str) -> Checkpoint:
        if self._world.is_lead:
            self._say(
                f"WARNING: checkpoint {checkpoint.path} is damaged: {damage}. It is not used; "
                "trying the previous one."
            )
        return checkpoint

    def _enter(self, chosen: Checkpoint, damaged: Sequence[Checkpoint]) -> None:
        """Put damaged ones aside, and mark the best again, before the run goes on."""
        for broken in damaged:
            self._set_aside(broken)
        best = read_state(chosen.path)["best"]
        self._mark_best(best["step"] if best else None)

    @contextmanager
    def _told_as_unusable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = kind_of_unread(error)
            named = f" ({error.filename})" if error.filename else ""
            raise kind(
                f"The checkpoints in {self._directory} cannot be used: "
                f"{error.strerror or error}{named}."
            ) from error

    def _require_same_rows(self, checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> None:
        before, now = manifest.get("train_rows"), self._facts.get("train_rows")
        if before is not None and now is not None and before != now:
            raise SpecError(
                f"{checkpoint.path} was trained on {before} rows, and the data set now has {now}. "
                "Use the original data, or start over with --fresh."
            )
        if "sampling" in manifest and manifest["sampling"] != self._facts.get("sampling"):
            raise SpecError(
                f"{checkpoint.path} was trained with rows that task.sampling chose differently, "
                "for example with other weights. Use the original sampling, or start over "
                "with --fresh."
            )


def agreed_checkpoint(directory: Path, which: str, world: World) -> Checkpoint:
    """The checkpoint for `best`, `latest` or a step; every process calls it, and rank 0 chooses.

    Raises:
        SpecError: it does not exist, or may not be read; on every process.
        NoCheckpoint: it is damaged, or a process has another one; on every process.
    """
    found: tuple[str, int, str] | None = None
    failed: EvenstepError | None = None
    try:
        if world.is_lead:
            chosen = find_checkpoint(directory, which)
            found = chosen.path.name, chosen.step, str(read_manifest(chosen)["sha256"])
    except EvenstepError as error:
        failed = error
    world.fail_together(failed)
    found = world.from_lead(found)
    assert found is not None, "rank 0 has found one, or failed"
    name, step, sha256 = found
    own = Checkpoint(directory / name, step)
    try:
        _require_that(own, sha256, world)
    except EvenstepError as error:
        failed = error
    world.fail_together(failed)
    return own


def _require_that(chosen: Checkpoint, sha256: str, world: World) -> None:
    """Check that this process finds the checkpoint that rank 0 has chosen.

    Raises:
        NoCheckpoint: it finds another one there, or none.
    """
    try:
        finds = "another" if read_manifest(chosen)["sha256"] != sha256 else None
    except NoCheckpoint as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        finds = "no"
    if finds is not None:
        raise NoCheckpoint(
            f"Process {world.index} finds {finds} checkpoint in {chosen.path}, unlike rank 0. Give "
            "all processes the same storage."
        )


def in_turn(sources: Iterable[Iterator[Bytes]]) -> Iterator[Bytes]:
    """One of each in turn, until all of them end."""
    left = list(sources)
    while left:
        for source in list(left):
            one = next(source, None)
            if one is None:
                left.remove(source)
            else:
                yield one


def _writer_threads(count: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads that write; `device` is their default device."""
    return ThreadPoolExecutor(count, WRITER, initializer=_begin_writing, initargs=(device,))


def _begin_writing(device: torch.device) -> None:
    """Prepare a new writer thread: it uses this device, and one thread for computing.

    Otherwise its first operation on a large tensor starts more OpenMP threads next to those that
    train.  Then libgomp counts more threads than cores, and all of them sleep as soon as they
    wait: training with two threads became slower than with one.
    """
    use(device)
    torch.set_num_threads(1)


def _require_fit(job: _Job, shard: Shard) -> None:
    """Wait until the content is copied from the device, and check that it is finite.

    Raises:
        EvenstepError: it could not be copied, or is not finite.
    """
    if job.failed is not None:
        raise job.failed
    if job.arrived is not None:
        job.arrived.synchronize()
        job.arrived.require_unchanged()
    require_finite(shard)


def _not_saved(step: int, directory: Path, error: OSError) -> EvenstepError:
    """The message for an error of the operating system."""
    where = ""
    if error.filename is not None and directory not in Path(error.filename).parents:
        where = f"{error.filename}, which belongs to it: "  # a file with the rows of its steps
    return kind_of(error)(
        f"The checkpoint of step {step} could not be written to {directory}: "
        f"{where}{in_the_way(error)}. Earlier ones are unchanged."
    )
