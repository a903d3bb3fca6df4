"""The W&B writer: one background thread makes all calls of wandb.

`wandb.init` may block for 90 s and then raise, `run.log` blocks while wandb's child process
(wandb-core) is frozen, `finish` waits for the server without limit, and so does the interpreter's
exit. Only the background thread waits for these. The training thread puts rows into a bounded
queue, and `close` waits for a given time and then kills wandb-core.

metrics.jsonl has every row, and a resumed attempt sends the rows that W&B does not have.
"""

from __future__ import annotations

import glob
import html
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from service.basics.background_queue import BackgroundQueue
from service.basics.running_time import TimeLimit, joined
from service.observability.logged_files import files_of_step, read_histogram
from service.runs.checkpoint_files import best_of, checkpoints_in
from service.runs.tracking import LoggedFile, Outcome, Row, Writer, read_metrics
from service.spec.models import WandBSpec

if TYPE_CHECKING:
    from wandb import Run

_ON_DISK_SECONDS = 1.0  # a killed process loses newer rows; the default of wandb is 15 s
_CORE_SECONDS = 60.0  # for wandb-core to start and answer; training does not wait for it
_LAST_WORDS_SECONDS = 5.0  # for the thread to end once wandb-core was killed


class WandB(Writer):
    """Sends the rows of all attempts of a run to one W&B run, online or offline."""

    def __init__(
        self,
        spec: WandBSpec,
        *,
        run_id: str,
        name: str,
        directory: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
        resume_step: int | None = None,
        init_seconds: float = 20.0,
    ) -> None:
        """Call `start` to connect.

        Args:
            run_id: the same in every attempt.
            directory: of the run, with metrics.jsonl, already cut to `resume_step`. wandb writes
                to wandb/ in it, or to `WANDB_DIR`, which must last as long as the run.
            config: plain values that W&B shows as the run's configuration.
            say: prints one line for the user; called by the thread and by `close`.
            resume_step: the step of the checkpoint that this attempt starts from, or None.
            init_seconds: how long to wait for the server before the run continues offline.
        """
        self._spec = spec
        self._run_id = run_id
        self._name = name
        self._metrics = directory / "metrics.jsonl"
        self._logged = directory / "logged"
        self._directory = directory
        self._config = dict(config)
        self._tell = say
        self._is_silent = False
        self._resume_step = resume_step
        self._init_seconds = init_seconds
        self._close_seconds = spec.finish_seconds
        self._mode: str = spec.mode
        self._owns_core = True
        self._rows: BackgroundQueue[Row] = BackgroundQueue()
        self._outcome: Outcome = "failed"
        self._received_rows = 0
        self._sent_rows = 0
        self._trouble: str | None = None
        self._stop = threading.Event()
        self._closing = False
        self._given_up = False
        self._files: str | None = None
        self._told_of_images = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)

    def start(self) -> Self:
        """Return at once; the thread imports wandb and connects."""
        self._directory = Path(os.environ.get("WANDB_DIR") or self._directory).absolute()
        self._mode = os.environ.get("WANDB_MODE") or self._mode
        # A wandb-core that another program has started is not killed here.
        self._owns_core = "WANDB_SERVICE" not in os.environ
        # At the interpreter's exit, wandb would wait for its exporter of error reports.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if self._mode != "disabled":
            self._thread.start()
        return self

    def write(self, row: Row) -> None:
        self._received_rows += 1
        self._rows.put(row)

    @property
    def stop_requested(self) -> bool:
        """Whether somebody pressed Stop on the run's page."""
        return self._stop.is_set()

    def close(self, outcome: Outcome) -> None:
        """Finish the W&B run within `finish_seconds`, or 5 s more if wandb-core must be killed."""
        if not self._thread.ident:
            return
        self._closing = True
        self._outcome = outcome
        self._rows.end()
        if not joined(self._thread, self._close_seconds):
            self._give_up()
        if self._mode != "disabled":
            self._report()
        self._is_silent = True

    def _report(self) -> None:
        """Report missing rows once; rows inside a frozen wandb-core are not counted."""
        missing = self._received_rows - self._sent_rows
        trouble = self._trouble or "the queue was full"
        if missing:
            self._say(
                f"W&B lacks {missing} or more of this attempt's {self._received_rows} rows: "
                f"{trouble}. {self._metrics} has them all."
            )
        elif self._trouble:
            hint = f" Upload the rest with: wandb sync {self._files}" if self._files else ""
            self._say(f"W&B did not finish: {trouble}.{hint}")

    def _give_up(self) -> None:
        """Kill wandb-core, repeatedly if necessary, so that the thread can end.

        Otherwise wandb's exit handler would wait forever for a frozen wandb-core.
        """
        self._given_up = True
        self._trouble = f"it had not finished after {self._close_seconds:g} s"
        limit = TimeLimit(_LAST_WORDS_SECONDS)
        while self._thread.is_alive() and limit.left:
            for child in psutil.Process().children(recursive=True) if self._owns_core else ():
                with suppress(psutil.Error):
                    if child.name().startswith("wandb-"):
                        child.kill()
            self._thread.join(0.1)

    def _say(self, text: str) -> None:
        if not self._is_silent:
            self._tell(text)

    # Everything below runs in the thread.

    def _work(self) -> None:
        try:
            run = self._open()
            if run is not None:
                self._send_until_closed(run)
                self._finish(run, self._outcome)
        except (Exception, SystemExit) as error:
            if not self._given_up:
                self._trouble = _one_line(error)
            if not self._closing:
                self._say(f"W&B stopped: {self._trouble}. Training continues without it.")
        finally:
            self._leave()

    def _open(self) -> Run | None:
        try:
            self._mode = self._settled_mode()
            if self._mode == "disabled":
                return None
            run = self._init(self._mode)
        except Exception as error:
            if self._given_up:
                raise
            self._say(f"W&B did not start ({_one_line(error)}); the run is kept offline.")
            self._leave()  # a failed init keeps the run's id in use
            run = self._init("offline")
        self._files = run.sync_dir
        if run.offline:
            self._say(f"W&B is offline; upload the run with: wandb sync {self._files}")
        else:
            self._say(f"W&B: {run.url}")
        return run

    def _settled_mode(self) -> str:
        """`auto` resolved, and modes that need a key set to offline if there is none."""
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True, x_service_wait=_CORE_SECONDS)).settings
        mode = settings.mode if self._mode == "auto" else self._mode
        if mode in ("online", "run") and not wandb.login(prompt=False, verify=False):
            self._say("W&B has no API key here (WANDB_API_KEY, ~/.netrc).")
            return "offline"
        return mode

    def _init(self, mode: str) -> Run:
        import wandb

        self._directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]  # WANDB_MODE may hold anything; wandb checks it
            id=self._run_id,
            resume="allow",
            name=self._name,
            project=self._spec.project,
            entity=self._spec.entity,
            group=self._spec.group,
            tags=self._spec.tags,
            dir=str(self._directory),
            config=self._config,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                init_timeout=_CORE_SECONDS if mode == "offline" else self._init_seconds,
                finish_timeout=self._close_seconds,
                finish_timeout_raises=True,
                x_service_wait=_CORE_SECONDS,
                x_transaction_log_flush_interval=_ON_DISK_SECONDS,
                # wandb deep-copies its settings, which works for a function but not for our lock.
                stop_fn=lambda: self._stop.set(),
            ),
        )
        # Our own column: with wandb's `step=`, rows that arrive late are dropped.
        run.define_metric("*", step_metric="step")
        return run

    def _send_until_closed(self, run: Run) -> None:
        """Send the rows that earlier attempts could not send, then the queue; no step twice."""
        held = self._held_step(run)
        if self._resume_step is not None and held < self._resume_step:
            for record in read_metrics(self._metrics):
                if held < record["step"] <= self._resume_step:
                    self._send(run, record, files_of_step(self._logged, int(record["step"])))
        for row in self._rows:
            if row.step > held:
                self._send(run, row.record(), row.files)
            self._sent_rows += 1

    def _send(self, run: Run, record: Mapping[str, float], files: Sequence[LoggedFile]) -> None:
        row: dict[str, Any] = dict(record)
        for file in files:
            if file.kind == "image" and find_spec("PIL") is None:
                if not self._told_of_images:
                    self._say("W&B shows no images without the package pillow.")
                self._told_of_images = True
            elif file.kind == "file" and file.path.is_file():
                run.save(file.path, base_path=self._logged.parent, policy="now")
            elif file.path.is_file():
                row[file.key] = _shown(file)
        run.log({"_timestamp": row.pop("time"), **row})

    def _held_step(self, run: Run) -> int:
        """The last step from earlier attempts in this W&B run, or -1.

        Online, from the server, and from files that are still to be uploaded.
        Offline, from the files: a note of our own could be ahead of what a killed wandb-core wrote.
        """
        kinds = ("offline-run",) if not run.offline else ("offline-run", "run")
        steps = [int(dict(run.summary).get("step", -1))]
        name = glob.escape(run.id)
        for kind in kinds:
            files = (self._directory / "wandb").glob(f"{kind}-*-{name}/run-{name}.wandb")
            steps += [last_step(file) for file in files]
        return max(steps)

    def _finish(self, run: Run, outcome: Outcome) -> None:
        """End the run as finished (done), failed, or preempted (stopped, with the exit code 75).

        A sweep requeues a preempted run, as 75 requests; but not a run that W&B's own Stop button
        has stopped, so that run ends as finished, with `outcome: stopped` in its summary.
        """
        if self._spec.artifacts == "reference":
            try:
                self._refer_to_checkpoints(run)
            except Exception as error:
                self._say(f"W&B did not accept the checkpoints: {_one_line(error)}.")
        run.summary["outcome"] = outcome
        exit_code = {"done": 0, "stopped": 75, "failed": 1}[outcome]
        if outcome == "stopped" and self.stop_requested:
            exit_code = 0
        elif outcome == "stopped":
            run.mark_preempting()
        run.finish(exit_code=exit_code)

    def _refer_to_checkpoints(self, run: Run) -> None:
        """One artifact each for the best and the newest checkpoint, with its path and no copy."""
        import wandb

        place = self._metrics.parent / "checkpoints"
        held = {checkpoint.step: checkpoint.path for checkpoint in checkpoints_in(place)}
        best, newest = best_of(place), max(held, default=None)
        for step in sorted({step for step in (best, newest) if step in held}):
            artifact = wandb.Artifact(
                f"{self._run_id}-checkpoint", type="checkpoint", metadata={"step": step}
            )
            artifact.add_reference(held[step].absolute().as_uri(), checksum=False)
            # W&B calls the last one `latest` by itself.
            run.log_artifact(artifact, aliases=["best"] if step == best else [])

    def _leave(self) -> None:
        """End wandb-core and take back wandb's exit handler, which would wait for it."""
        if self._owns_core and "wandb" in sys.modules:
            # It raises if wandb-core was killed, and ends in sys.exit if wandb-core failed.
            with suppress(Exception, SystemExit):
                sys.modules["wandb"].teardown()


def last_step(path: Path) -> int:
    """The last `step` in a .wandb file, or -1; an incomplete record at its end is skipped."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time

    last = None
    for content in _records(path):
        try:
            record = Record.FromString(content)
        except DecodeError:
            break
        if record.WhichOneof("record_type") == "history":
            last = record.history
    items = last.item if last is not None else ()
    steps = (json.loads(item.value_json) for item in items if list(item.nested_key) == ["step"])
    return next(steps, -1)


_BLOCK_BYTES = 32 * 1024
_FILE_HEADER_BYTES = 7
_PIECE_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _LAST = 1, 2, 4


def _records(path: Path) -> Iterator[bytes]:
    """The complete records of a .wandb file, joined from their pieces.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    content = b""
    with path.open("rb") as file:
        position = _FILE_HEADER_BYTES
        while block := file.read(_BLOCK_BYTES):
            while position + _PIECE_HEADER.size <= len(block):
                _, length, kind = _PIECE_HEADER.unpack_from(block, position)
                position += _PIECE_HEADER.size
                piece = block[position : position + length]
                if kind == 0 or len(piece) < length:
                    break
                position += length
                content = piece if kind in (_WHOLE, _FIRST) else content + piece
                if kind in (_WHOLE, _LAST):
                    yield content
            position = 0


def _shown(file: LoggedFile) -> Any:
    import wandb

    if file.kind == "image":
        return wandb.Image(str(file.path))
    if file.kind == "histogram":
        return wandb.Histogram(np_histogram=read_histogram(file.path))
    return wandb.Html(f"<pre>{html.escape(file.path.read_text())}</pre>", inject=False)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
