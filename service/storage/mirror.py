"""Uploads the directory of a run to its address in a store, beside the run.

The run is trained in a scratch directory, where each save is fast and atomic as everywhere. Threads
of the launcher, which does not train, upload each new checkpoint and what was appended since, in
pieces; the object that publishes them is written last. Only then is deleted what it replaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from service.basics.errors import EvenstepError
from service.basics.multipart import PART_BYTES
from service.runs.checkpoint_files import BEST, MANIFEST, checkpoints_in, kept, read_state
from service.runs.directory import RunDirectory
from service.spec.models import CheckpointSpec
from service.storage.lease import Lease
from service.storage.published import (
    CHECKPOINTS,
    DATA,
    PUBLISHED,
    Files,
    Piece,
    Published,
    Stamp,
    checkpoints_of,
    decoded,
    stamps_in,
    step_of,
)
from service.storage.staging import Staged, Staging
from service.storage.store import NoObject, Store, in_parallel

_BEST = f"{CHECKPOINTS}/{BEST}"


class LeaseLost(EvenstepError):
    """Another launcher has taken over a run that this one was writing."""


class Mirror:
    """The upload of one run. `publish` is called by one thread at a time."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        run: RunDirectory,
        *,
        held: Published | None,
        scratch: str,
        spec: CheckpointSpec,
        say: Callable[[str], None],
    ) -> None:
        """`held` is what the store holds now; `scratch` is the id of this scratch directory."""
        self._store = store
        self._lease = lease
        self._run = run
        self._held = held
        self._scratch = scratch
        self._spec = spec
        self._say = say
        self._staging = Staging(run)
        self._number = 0
        self._ready: dict[tuple[str, int, str], Piece] = {}
        """What was uploaded for a publication that failed: path, begin and SHA-256."""
        self._known: dict[str, tuple[tuple[int, int, int], Sequence[Piece]]] = {}
        """The pieces of files that were seen before, with the file's identity."""
        self._identities: dict[str, tuple[int, int, int]] = {}
        """The same identities, of what is being published."""
        self._obsolete: set[str] = set()
        self._staging.clear()
        local = {each.path.name for each in checkpoints_in(run.checkpoints)}
        self._absent = {
            name: files for name, files in checkpoints_of(held).items() if name not in local
        }
        """Checkpoints that the store holds and the scratch directory does not."""

    @property
    def published(self) -> Published | None:
        """What the store holds."""
        return self._held

    def newest_step(self) -> int:
        """The step of the newest checkpoint that the store holds; 0 if it holds none."""
        return max(map(step_of, checkpoints_of(self._held)), default=0)

    def take_over(self) -> None:
        """Publish under this lease what the store holds, and delete what was never published.

        From then on nothing counts that an earlier writer, which is still on its way, publishes.
        """
        if self._held is not None:
            self._number += 1
            self._put(self._held.files, self._held.run)
        needed = set(self._held.objects()) if self._held is not None else set()
        for stamp in stamps_in(self._store.sizes(PUBLISHED)):
            name = f"{PUBLISHED}{stamp}.json"
            with suppress(NoObject):
                other = decoded(self._store.get(name), stamp, self._store)
                if self._held is None or other.run != self._held.run:
                    needed |= other.objects()  # a run that --fresh has set aside
                elif other.stamp != self._held.stamp:
                    self._obsolete.add(name)
        self._obsolete |= set(self._store.sizes(DATA)) - needed
        self._clean()

    def publish(self) -> bool:
        """Upload the run as it is now; whether something has changed.

        Raises:
            EvenstepError: the store does not take it; what it held before is unchanged.
            LeaseLost: another launcher writes this run now.
        """
        try:
            run = str(self._run.read_facts()["id"])
            self._number += 1
            files = self._uploaded(run)
            if self._held is not None and (self._held.files, self._held.run) == (files, run):
                return False
            self._require_arrived(files)
            self._put(files, run)
            self._known = {path: (same, files[path]) for path, same in self._identities.items()}
            self._clean()
            return True
        finally:
            self._staging.clear()

    # ---- what is to be published

    def _uploaded(self, run: str) -> Files:
        """All files of the run, whose pieces are in the store."""
        if self._held is not None and self._held.run != run:  # by --fresh
            self._held, self._absent, self._known = None, {}, {}
        self._identities = {}
        checkpoints = self._staging.checkpoints()
        best = self._staging.best()
        planned: dict[str, list[Piece | _Span]] = {}
        for name, staged in checkpoints.items():
            planned |= self._checkpoint(name, staged)
        planned |= self._kept_absent(checkpoints)
        if best is not None and f"{CHECKPOINTS}/{best.strip()}/{MANIFEST}" in planned:
            planned[_BEST] = [_Span.of_text(_BEST, best)]
        elif self._held is not None and _BEST in self._held.files:
            planned[_BEST] = list(self._held.files[_BEST])
        for each in self._staging.others():  # after the checkpoints, whose rows are in these
            planned[each.path] = self._growing(each)
        spans = [span for parts in planned.values() for span in parts if isinstance(span, _Span)]
        pieces = dict(zip(map(id, spans), in_parallel(self._piece, spans), strict=True))
        return {
            path: [part if isinstance(part, Piece) else pieces[id(part)] for part in parts]
            for path, parts in planned.items()
        }

    def _checkpoint(self, name: str, staged: Sequence[Staged]) -> dict[str, list[Piece | _Span]]:
        """The files of a checkpoint: as the store has them, or to be uploaded."""
        manifest = next(each for each in staged if each.path.endswith(f"/{MANIFEST}"))
        told = self._held.files.get(manifest.path) if self._held is not None else None
        own = hashlib.sha256(manifest.file.read_bytes()).hexdigest()
        if told is not None and [piece.sha256 for piece in told] == [own]:
            return {path: list(each) for path, each in checkpoints_of(self._held)[name].items()}
        return {each.path: list(_Span.all_of(each, 0)) for each in staged}

    def _kept_absent(
        self, checkpoints: Mapping[str, Sequence[Staged]]
    ) -> dict[str, list[Piece | _Span]]:
        """The checkpoints that only the store has, as far as the spec keeps them."""
        self._absent = {k: files for k, files in self._absent.items() if k not in checkpoints}
        if checkpoints and self._absent:
            newest = max(checkpoints, key=step_of)
            state = read_state(checkpoints[newest][0].file.parent)
            first = state["best"]
            best = [each["step"] for each in (first, *state["runners_up"])] if first else []
            stay = kept(
                [step_of(name) for name in (*checkpoints, *self._absent)],
                newest=self._spec.keep,
                every=self._spec.keep_every_steps,
                best=best,
            )
            self._absent = {k: files for k, files in self._absent.items() if step_of(k) in stay}
        return {
            path: list(pieces) for files in self._absent.values() for path, pieces in files.items()
        }

    def _growing(self, staged: Staged) -> list[Piece | _Span]:
        """The pieces of a file that the store has already, and what is new of it."""
        self._identities[staged.path] = staged.identity
        identity, known = self._known.get(staged.path, ((0, 0, 0), ()))
        if identity == staged.identity:
            return list(known)
        if not (identity[0] == staged.identity[0] and staged.grows):
            told = self._held.files.get(staged.path, ()) if self._held is not None else ()
            known = list(_unchanged(told, staged))
        pieces, end = list(known), staged.size_bytes
        # As in a binary counter: a piece joins the ones before it that are no larger, so of n
        # appended segments there are log n.
        while pieces and end - pieces[-1].begin <= PART_BYTES:
            last = pieces[-1]
            if end == last.end or last.end - last.begin > end - last.end:
                break
            pieces.pop()
        begin = pieces[-1].end if pieces else 0
        if pieces and begin == end:
            return list(pieces)
        return [*pieces, *_Span.all_of(staged, begin)]

    def _piece(self, span: _Span) -> Piece:
        """Upload a span, unless it has been."""
        content = span.read()
        sha256 = hashlib.sha256(content).hexdigest()
        known = self._ready.get((span.path, span.begin, sha256))
        if known is not None:
            return known
        at = "" if span.is_whole else f"@{span.begin}"
        name = f"{DATA}{Stamp(self._lease.term, self._number)}/{span.path}{at}"
        self._store.put(name, content)
        piece = Piece(span.begin, span.begin + len(content), sha256, name)
        self._ready[span.path, span.begin, sha256] = piece
        return piece

    # ---- publish

    def _require_arrived(self, files: Files) -> None:
        """Check that the store lists each new piece with its size.

        Raises:
            EvenstepError: it does not.
        """
        new = {p.name: p.end - p.begin for p in self._ready.values()}
        needed = {piece.name for pieces in files.values() for piece in pieces} & set(new)
        stamps = {name.split("/")[1] for name in needed}
        listed: dict[str, int] = {}
        for stamp in stamps:
            listed |= self._store.sizes(f"{DATA}{stamp}/")
        wrong = sorted(name for name in needed if listed.get(name) != new[name])
        if wrong:
            self._ready = {k: p for k, p in self._ready.items() if p.name not in wrong}
            raise EvenstepError(
                f"{self._store.address}: {len(wrong)} objects did not arrive as they were sent, "
                f"such as {wrong[0]}; they are sent again."
            )

    def _put(self, files: Files, run: str) -> None:
        """Publish the files; what only the earlier publication needed is obsolete then."""
        stamp = Stamp(self._lease.term, self._number)
        new = Published(stamp, run, self._scratch, files)
        if not self._store.create(new.name, new.encoded()):
            raise LeaseLost(self._lost())
        before, self._held = self._held, new
        needed = new.objects()
        self._obsolete |= {piece.name for piece in self._ready.values()} - needed
        self._ready = {}
        if before is not None:
            self._obsolete |= {*before.objects(), before.name} - needed

    def _clean(self) -> None:
        """Delete what is obsolete, if this launcher still holds the run.

        The order keeps it safe: publish, then look at the leases, then delete. Whoever takes over
        creates a lease first and then reads what is published: if this look does not see the new
        lease, its holder sees the new publication, and needs nothing of what is deleted.
        """
        if self._lease.is_lost():
            raise LeaseLost(self._lost())
        self._store.remove(sorted(self._obsolete))
        self._obsolete = set()

    def _lost(self) -> str:
        return (
            f"{self._store.address}: another launcher has taken this run over, because its lease "
            f"was not renewed for {self._lease.seconds:g} s. What this one trained since is in "
            f"{self._run.path}, and is not uploaded."
        )


class _Span:
    """Bytes of a file that are to be uploaded as one piece."""

    def __init__(self, path: str, begin: int, end: int, *, whole: int, source: Path | bytes):
        self.path, self.begin, self.end = path, begin, end
        self.is_whole = begin == 0 and end == whole
        self._source = source

    @classmethod
    def of_text(cls, path: str, text: str) -> _Span:
        content = text.encode()
        return cls(path, 0, len(content), whole=len(content), source=content)

    @classmethod
    def all_of(cls, staged: Staged, begin: int) -> Iterator[_Span]:
        """A staged file from `begin` to its end."""
        whole = staged.size_bytes
        ends = [*range(begin + PART_BYTES, whole, PART_BYTES), whole]
        for start, end in zip([begin, *ends], ends, strict=False):
            yield cls(staged.path, start, end, whole=whole, source=staged.file)

    def read(self) -> bytes:
        if isinstance(self._source, bytes):
            return self._source
        return _read(self._source, self.begin, self.end)


def _read(file: Path, begin: int, end: int) -> bytes:
    with file.open("rb", buffering=0) as opened:
        opened.seek(begin)
        content = opened.read(end - begin) or b""
    if len(content) != end - begin:
        raise EvenstepError(f"{file} has become shorter while it was uploaded; it is read again.")
    return content


def _unchanged(pieces: Sequence[Piece], staged: Staged) -> Iterator[Piece]:
    """The first pieces of a file in the store that the file on disk begins with."""
    for piece in pieces:
        if piece.end > staged.size_bytes:
            return
        content = _read(staged.file, piece.begin, piece.end)
        if hashlib.sha256(content).hexdigest() != piece.sha256:
            return
        yield piece
