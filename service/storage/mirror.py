"""Uploads the directory of a run to its address in a store, beside the run.

The run is trained in a scratch directory, where each save is fast and atomic as everywhere. Threads
of the launcher, which does not train, upload each new checkpoint and what was appended since, in
pieces; the object that publishes them is written last. Only then is deleted what it replaces.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from service.basics.errors import EvenstepError, NoCheckpoint
from service.basics.multipart import PART_BYTES
from service.runs.checkpoint_files import (
    BEST,
    MANIFEST,
    Checkpoint,
    checkpoints_in,
    damage_of,
    kept,
    read_state,
)
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
_LONGEST_NAME_BYTES, _POSITION_BYTES = 1024, 16
"""Of an object, in S3, GCS and Azure; and of the position of a piece in its name."""
_Key = tuple[str, int, str]
"""Of a piece: its path, its begin and its SHA-256."""


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
        above = f"{store.address}/{DATA}{Stamp(lease.term, 0)}/@"
        room = _LONGEST_NAME_BYTES - len(above.encode()) - _POSITION_BYTES
        self._staging = Staging(run, longest_bytes=room, say=say)
        self._number = 0
        self._ready: dict[_Key, Piece] = {}
        """What was uploaded for a publication that failed."""
        self._sent: set[_Key] = set()
        """The same, also if it did not arrive."""
        self._known: dict[str, tuple[tuple[int, int, int], Sequence[Piece]]] = {}
        """The pieces of files that were seen before, with the file's identity."""
        self._identities: dict[str, tuple[int, int, int]] = {}
        """The same identities, of what is being published."""
        self._obsolete: set[str] = set()
        self._is_uncleaned = False
        self._replaced: set[str] = set()
        """What the files needed that are uploaded again: it stays until they are."""
        self.moved = time.monotonic()
        """When the upload last came forward, by the monotonic clock."""
        self._staging.clear()
        local = checkpoints_in(run.checkpoints)
        names, newest = {each.path.name for each in local}, max((c.step for c in local), default=0)
        self._absent = {
            name: files
            for name, files in checkpoints_of(held).items()
            if name not in names and step_of(name) < newest
        }
        """Checkpoints that the store holds and the scratch directory does not; none that is newer,
        for the run goes on from an older one then, and takes these steps again."""
        self._unverified = set(names)
        """Checkpoints that were here at the start: nobody has read them yet."""
        self._damaged: dict[str, int] = {}
        """Those of them that are damaged, with the number of their directory."""

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
        is_all_known = True
        for stamp in stamps_in(self._store.sizes(PUBLISHED)):
            name = f"{PUBLISHED}{stamp}.json"
            try:
                other = decoded(self._store.get(name), stamp, self._store)
            except NoObject:
                continue
            except NoCheckpoint as damaged:
                is_all_known = False
                self._say(f"WARNING: {damaged} It stays, and so do all objects of earlier runs.")
                continue
            if self._held is None or other.run != self._held.run:
                needed |= other.objects()  # a run that --fresh has set aside
            elif other.stamp != self._held.stamp:
                self._obsolete.add(name)
        listed = set(self._store.sizes(DATA))
        if is_all_known:
            self._obsolete |= listed - needed
        self._forget_missing(listed)
        # Where nothing is published, an earlier writer may still publish what it has uploaded. It
        # is deleted when a newer publication is there.
        if self._held is not None:
            self._clean_if_possible()

    def find_missing(self) -> None:
        """Look whether the store has lost something since, which is uploaded again then."""
        self._forget_missing(set(self._store.sizes(DATA)))

    def _forget_missing(self, listed: set[str]) -> None:
        """Forget the files of which the store has lost an object, so that they are uploaded again.

        They stay published until then: a reader says what is missing.
        """
        if self._held is None:
            return
        missing = self._held.objects() - listed
        if not missing:
            return
        self._say(
            f"WARNING: {self._store.address}: {len(missing)} objects are published, but not in the "
            f"store, such as {min(missing)}: somebody, or a lifecycle rule of the bucket, has "
            "deleted them. What is on this machine is uploaded again."
        )
        lost = {
            path
            for path, pieces in self._held.files.items()
            if any(piece.name in missing for piece in pieces)
        }
        broken = {
            name for name, files in checkpoints_of(self._held).items() if not lost.isdisjoint(files)
        }
        lost |= {path for name in broken for path in checkpoints_of(self._held)[name]}
        self._absent = {name: files for name, files in self._absent.items() if name not in broken}
        whole = {path: pieces for path, pieces in self._held.files.items() if path not in lost}
        self._replaced |= self._held.objects()
        self._held, self._known = replace(self._held, files=whole), {}

    def publish(self) -> bool:
        """Upload the run as it is now; whether something has changed.

        Of several new checkpoints each has its own publication, the newest first: only one at a
        time is held on disk, however long its upload takes.

        Raises:
            EvenstepError: the store does not take it; what it held before is unchanged.
            LeaseLost: another launcher writes this run now.
        """
        has_changed = False
        while True:
            changed, is_all = self._publish_next()
            has_changed = has_changed or changed
            self.moved = time.monotonic()
            if is_all:
                return has_changed

    def _publish_next(self) -> tuple[bool, bool]:
        """One publication: whether something has changed, and whether all is up."""
        try:
            self._number += 1
            files, run, is_all = self._uploaded()
            changed = self._held is None or (self._held.files, self._held.run) != (files, run)
            if changed:
                self._require_arrived(files)
                self._put(files, run)
                self._known = {path: (same, files[path]) for path, same in self._identities.items()}
            self._clean_if_possible()
            return changed, is_all
        finally:
            self._staging.clear()

    # ---- what is to be published

    def _uploaded(self) -> tuple[Files, str, bool]:
        """All files of the run, whose pieces are in the store; its id; whether that is all."""
        place = self._staging.place()
        run = str(self._run.read_facts()["id"])
        if self._held is not None and self._held.run != run:  # by --fresh
            self._held, self._absent, self._known = None, {}, {}
        self._identities = {}
        planned, is_all = self._checkpoints()
        best = self._staging.best()
        if best is not None and f"{CHECKPOINTS}/{best.strip()}/{MANIFEST}" in planned:
            planned[_BEST] = [_Span.of_text(_BEST, best)]
        others = self._staging.others()  # after the checkpoints, whose rows are in these
        if self._staging.place() != place:
            raise EvenstepError(
                f"{self._run.path} was replaced while it was read; it is read again."
            )
        for each in others:
            planned[each.path] = self._growing(each)
        spans = [span for parts in planned.values() for span in parts if isinstance(span, _Span)]
        pieces = dict(zip(map(id, spans), in_parallel(self._piece, spans), strict=True))
        files = {
            path: [part if isinstance(part, Piece) else pieces[id(part)] for part in parts]
            for path, parts in planned.items()
        }
        return files, run, is_all

    def _checkpoints(self) -> tuple[_Planned, bool]:
        """The files of the checkpoints: those that the store has, and the newest that it has not.

        Also whether there are no more that it has not.
        """
        planned: _Planned = {}
        new = []
        manifests = self._staging.manifests()
        for each, manifest in manifests.items():
            pieces = self._pieces_of(each, manifest)
            if pieces is None:
                new.append(each)
            else:
                planned |= {path: list(parts) for path, parts in pieces.items()}
        staged: list[Staged] = []
        while new and not staged:
            each = new.pop(0)
            if not self._is_damaged(each):
                with suppress(FileNotFoundError):  # removed, so there is a newer one soon
                    staged = self._staging.checkpoint(each.path)
        planned |= {file.path: list(_Span.all_of(file, 0)) for file in staged}
        if not planned and self._held is not None:  # never take away the last of the store
            planned = {
                path: list(parts)
                for files in checkpoints_of(self._held).values()
                for path, parts in files.items()
            }
        return planned | self._kept_absent(list(manifests)), not new

    def _pieces_of(self, checkpoint: Checkpoint, manifest: bytes) -> Files | None:
        """What the store has of a checkpoint; None if it has another one, or none, of this name."""
        files = checkpoints_of(self._held).get(checkpoint.path.name, {})
        told = files.get(f"{CHECKPOINTS}/{checkpoint.path.name}/{MANIFEST}")
        if told is None:
            return None
        same = [piece.sha256 for piece in told] == [hashlib.sha256(manifest).hexdigest()]
        return files if same or self._is_damaged(checkpoint) else None

    def _is_damaged(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint that was here at the start is damaged; the store's is better."""
        name = checkpoint.path.name
        if name not in self._unverified:
            return False
        try:
            number = os.stat(checkpoint.path).st_ino
            if self._damaged.get(name) == number:
                return True
            damage = damage_of(checkpoint)
        except FileNotFoundError:
            return True  # it is not here any more
        if damage is None:
            self._unverified.discard(name)
            return False
        self._damaged[name] = number
        self._say(f"WARNING: {checkpoint.path} is not uploaded: {damage}.")
        return True

    def _kept_absent(self, here: Sequence[Checkpoint]) -> _Planned:
        """The checkpoints that only the store has, as far as the spec keeps them."""
        names = {each.path.name for each in here}
        self._absent = {k: files for k, files in self._absent.items() if k not in names}
        if here and self._absent:
            stay = kept(
                [each.step for each in here] + [step_of(name) for name in self._absent],
                newest=self._spec.keep,
                every=self._spec.keep_every_steps,
                best=_best_steps(here[0]),
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
        # A file that replaces another one may have its number. It has other rows then, with other
        # times, at least in the last piece.
        grew = staged.grows and identity[0] == staged.identity[0]
        if not (grew and list(_unchanged(known[-1:], staged))):
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
        key = span.path, span.begin, sha256
        known = self._ready.get(key)
        if known is not None:
            return known
        # No file has the name of a piece of another one: after the last `@` is the begin.
        at = "" if span.is_whole and "@" not in span.path else f"@{span.begin}"
        name = f"{DATA}{Stamp(self._lease.term, self._number)}/{span.path}{at}"
        self._store.put(name, content, sha256=sha256)
        if key not in self._sent:
            self._sent.add(key)
            self.moved = time.monotonic()
        piece = Piece(span.begin, span.begin + len(content), sha256, name)
        self._ready[key] = piece
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
        self._ready, self._sent = {}, set()
        if before is not None:
            self._obsolete |= {*before.objects(), *self._replaced, before.name} - needed
            self._replaced = set()

    def _clean_if_possible(self) -> None:
        """Delete what is obsolete; what cannot be deleted now is tried again after the next save.

        Raises:
            LeaseLost: another launcher writes this run now.
        """
        try:
            self._clean()
        except LeaseLost:
            raise
        except EvenstepError as error:
            if not self._is_uncleaned:
                self._say(f"WARNING: {error} All is uploaded, but old objects are not deleted.")
            self._is_uncleaned = True
        else:
            self._is_uncleaned = False

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

    def require_lease(self) -> None:
        """Check that no other launcher has taken the run over, as far as it is known.

        Raises:
            LeaseLost: it has.
        """
        if self._lease.is_known_lost:
            raise LeaseLost(self._lost())

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


_Planned = dict[str, list[Piece | _Span]]
"""By path: the pieces of a file that are in the store, and its bytes that are not."""


def _best_steps(newest: Checkpoint) -> list[int]:
    """The steps of the best checkpoints, according to the newest one."""
    try:
        state = read_state(newest.path)
        first = state["best"]
        return [int(each["step"]) for each in (first, *state["runners_up"])] if first else []
    except (NoCheckpoint, KeyError, TypeError, ValueError):  # damaged, or from another version
        return []


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
