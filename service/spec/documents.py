"""A YAML, JSON or TOML file as plain values, with the position of each of them.

Scalars follow the core schema of YAML 1.2: `1e-3` is a number, `no` and `12:30` are text,
`012` is twelve. Ambiguous input is refused: a duplicate key, a tag, an alias.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from service.basics.errors import SpecError, did_you_mean

LARGEST_FILE_BYTES = 1 << 20
DEEPEST_NESTING = 64
LONGEST_INTEGER_DIGITS = 100
_YAML = (".yaml", ".yml")
SUFFIXES = (*_YAML, ".json", ".toml")

Steps = tuple[str | int, ...]
"""The path of a value: `("optimizer", "groups", 0, "lr")`."""


class SourcePosition(NamedTuple):
    """A position. Positions sort in reading order: the file, then the overrides."""

    override: int
    """0 in the file, n in the n-th override, -n in the n-th file that the file extends."""
    line: int
    column: int
    text: str
    """The printed form: `spec.yaml:5:3`, the override itself, or empty for a mapping."""
    folder: str = ""
    """The directory of the file, to which its relative paths refer."""


NOWHERE = SourcePosition(0, 0, 0, "")


@dataclass(frozen=True)
class Document:
    """Plain values (None, bool, int, float, str, list, dict) and their positions."""

    values: dict[str, Any]
    keys: dict[Steps, SourcePosition] = field(default_factory=dict)
    """The start of each key, or item of a list."""
    contents: dict[Steps, SourcePosition] = field(default_factory=dict)
    """The start of the value of each."""
    source: str = ""
    """The name of the file as given; empty for a mapping."""
    overrides: int = 0

    def place_of_key(self, steps: Steps) -> SourcePosition:
        """The position of the key, or of the nearest enclosing key."""
        while steps and steps not in self.keys:
            steps = steps[:-1]
        return self.keys.get(steps, NOWHERE)

    def place_of_value(self, steps: Steps) -> SourcePosition:
        """The position of the value, or of the nearest enclosing key."""
        return self.contents.get(steps) or self.place_of_key(steps)


def read_document(path: str | os.PathLike[str], *, rank: int = 0) -> Document:
    """The values of the file and their positions; JSON and TOML by suffix, YAML otherwise.

    Args:
        rank: the `override` of its positions.
    Raises:
        SpecError: names the position of the first error.
    """
    source = os.fspath(path) or "''"
    document = _document_in(_decode(_read(source), source=source), source=source)
    return document if rank == 0 else _ranked(document, rank)


def _document_in(text: str, *, source: str) -> Document:
    match Path(source).suffix.lower():
        case ".toml":
            return _read_toml(text, source=source)
        case ".json":
            _check_json(text, source=source)
            return _read_yaml(_json_as_yaml(text), source=source)
        case _:
            return _read_yaml(text, source=source)


def read_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a file without their positions, in a fraction of the time: libyaml parses it.

    Raises:
        SpecError: as `read_document`.
    """
    source = os.fspath(path)
    return values_in(_read(source), source=source)


def values_in(content: bytes, *, source: str) -> dict[str, Any]:
    """The same of the content of a file.

    Args:
        source: the name of the file.
    Raises:
        SpecError: as `read_document`.
    """
    text = _decode(content, source=source)
    if Path(source).suffix.lower() in _YAML and yaml.__with_libyaml__:
        # An error lacks its place: the other reader finds it again.
        with suppress(ValueError, OverflowError, yaml.YAMLError):
            return _quick_document(text)
    return _document_in(text, source=source).values


def _ranked(document: Document, rank: int) -> Document:
    keys, contents = (
        {steps: at._replace(override=rank) for steps, at in places.items()}
        for places in (document.keys, document.contents)
    )
    return replace(document, keys=keys, contents=contents)


def document_of(mapping: Mapping[str, Any]) -> Document:
    """A copy of a mapping from Python, with tuples as lists; only plain values are accepted."""
    values: dict[str, Any] = _plain(mapping, steps=())
    return Document(values)


class Setting(NamedTuple):
    """A value for a key: `key.sub.0=value` of a command line, or one that was given in Python."""

    names: tuple[str, ...]
    """The names of the key; in a list, a number or the text of one."""
    value: Any
    text: str
    """The position that messages show."""
    written: int
    """How many of the names were written with dots: a number among them begins a list where there
    is nothing yet. The other names are keys of mappings."""


def setting_of(text: str) -> Setting:
    """The setting `key.sub.0=value` of a command line.

    A value is parsed as YAML; text that does not begin with a quote or a bracket is always
    one scalar, so that `match=*.bias` needs no quotes. `key=` is null, and so is
    Python's None, which W&B's sweep agents write.
    """
    key, equals, content = text.partition("=")
    if not equals:
        raise SpecError(f"{text}: must be key=value, such as optimizer.lr=0.1")
    names = tuple(key.strip().removeprefix("--").split("."))
    if not all(names) or len(names) > DEEPEST_NESTING:
        raise SpecError(f"{text}: {key.strip()!r} is not a key; write it as section.key=value")
    return Setting(names, _override_value(content.strip(), text), text, written=len(names))


def override(document: Document, setting: Setting) -> Document:
    """`document` with the value of the setting; its position is the text of the setting."""
    place = SourcePosition(document.overrides + 1, 0, 0, setting.text)
    values = _with(document.values, setting.names, setting, before=())
    return _with_place(document, values, _steps(values, setting.names), place)


def find(values: Any, steps: Steps) -> Any:
    """The value at `steps`, or None if there is none."""
    for step in steps:
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int) and step < len(values):
            values = values[step]
        else:
            return None
    return values


# ---- the file


def _read(source: str) -> bytes:
    try:
        with open(source, "rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{source}: there is no such file{files_like(source)}") from None
    except IsADirectoryError:
        raise SpecError(f"{source}: is a directory; name a file{files_like(source)}") from None
    except OSError as error:
        raise SpecError(f"{source}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise SpecError(f"{source!r}: cannot be read: {error}") from None
    if len(content) > LARGEST_FILE_BYTES:
        raise SpecError(
            f"{source}: must be at most {LARGEST_FILE_BYTES} bytes, but is larger; "
            "is this the file you meant?"
        )
    return content


def files_like(source: str) -> str:
    """A suggestion for a missing file: a similar name, perhaps."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    if not folder.is_dir():
        return f", and no directory {str(folder)!r}"
    try:
        names = [name for name in os.listdir(folder) if name.endswith(SUFFIXES)]
    except OSError:
        return ""
    return did_you_mean(Path(source).name, names[:20])


def _decode(content: bytes, *, source: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace")
        line, column = _line_and_column(before, len(before))
        wrong = f"byte 0x{content[error.start]:02x}"
        raise SpecError(
            f"{_in_file(source, line, column).text}: not UTF-8 text ({wrong})"
        ) from None


def _line_and_column(text: str, index: int) -> tuple[int, int]:
    """Both counted from 0, as in PyYAML."""
    return text.count("\n", 0, index), index - (text.rfind("\n", 0, index) + 1)


def _in_file(source: str, line: int, column: int) -> SourcePosition:
    """`line` and `column` are counted from 0; messages count from 1."""
    text = f"{source}:{line + 1}:{column + 1}"
    return SourcePosition(0, line + 1, column + 1, text, os.path.dirname(source))


# ---- YAML


def _read_yaml(text: str, *, source: str) -> Document:
    reader = _YamlReader(text, place=partial(_in_file, source))
    values = reader.read()
    if not isinstance(values, dict):
        what = "empty" if values is None else shown(values)
        begin = reader.contents[()].text if values is not None else source
        raise SpecError(f"{begin}: must be a mapping of keys to values, but is {what}")
    reader.keys[()] = reader.contents[()]
    return Document(values, reader.keys, reader.contents, source)


# The beginnings of PyYAML's most common errors, and what the user can do about them.
_PROBLEMS = {
    "found character '\\t'": "a tab where only spaces are allowed; indent with spaces",
    "mapping values are not allowed": "this ':' begins a second value; check the indentation, "
    "and put text that contains ': ' in quotes",
    "expected <block end>": "this does not match the lines above it; check the indentation",
    "could not find expected ':'": "a key without its ':'",
    "found unexpected end of stream": "a quote is not closed",
    "expected '<document start>'": "something follows the end of the value; text that begins with "
    "a bracket or a quote must be in quotes as a whole",
}


_OLD_LINE_BREAK = re.compile("[\x85\u2028\u2029]")


class _YamlReader:
    """Builds values from PyYAML's events, so that nothing is expanded, and nesting is limited."""

    def __init__(
        self,
        text: str,
        *,
        place: Callable[[int, int], SourcePosition],
        none: tuple[str, ...] = (),
    ) -> None:
        self.keys: dict[Steps, SourcePosition] = {}
        self.contents: dict[Steps, SourcePosition] = {}
        self._text = text
        self._place = place
        self._none = none
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._last: Any = None

    def read(self) -> Any:
        if found := _OLD_LINE_BREAK.search(self._text):
            where = self._place(*_line_and_column(self._text, found.start())).text
            raise SpecError(
                f"{where}: U+{ord(found[0]):04X} ends a line in YAML 1.1 and none in YAML 1.2. "
                f'Remove it, or write "\\u{ord(found[0]):04x}" within double quotes'
            )
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        values = self._value(self._next(), ())
        self._next()  # the document's end
        if not isinstance(self._next(), yaml.StreamEndEvent):
            self._fault(self._last, "a second document begins; a spec is one document")
        return values

    def _value(self, event: Any, steps: Steps) -> Any:
        self.contents[steps] = self._at(event.start_mark)
        self._check(event, steps)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._items(steps)
        return self._entries(steps)

    def _check(self, event: Any, steps: Steps) -> None:
        if len(steps) > DEEPEST_NESTING:
            self._fault(event, f"nested deeper than {DEEPEST_NESTING} levels")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._fault(
                event, "anchors and aliases (& and *) are not supported; write the value out"
            )
        if event.tag is not None:
            self._fault(event, f"tags ({event.tag}) are not supported; write the plain value")

    def _items(self, steps: Steps) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            here = (*steps, len(items))
            self.keys[here] = self._at(event.start_mark)
            items.append(self._value(event, here))
        return items

    def _entries(self, steps: Steps) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._key(event, steps)
            here = (*steps, key)
            if key in entries:
                first = self.keys[here].line
                also = f"; it is also on line {first}" if first else ""
                self._fault(event, f"{key!r} is written twice{also}")
            self.keys[here] = self._at(event.start_mark)
            entries[key] = self._value(self._next(), here)
        return entries

    def _key(self, event: Any, steps: Steps) -> str:
        self._check(event, steps)
        if not isinstance(event, yaml.ScalarEvent):
            self._fault(event, "a key must be text, but is a list or a mapping")
        key = self._scalar(event)
        if not isinstance(key, str):
            self._fault(event, f"a key must be text, but is {shown(key)}; put it in quotes")
        return key

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        try:
            plain = not event.style  # None of PyYAML, empty of libyaml
            return scalar(event.value, none=self._none) if plain else _whole_text(event.value)
        except ValueError as error:
            self._fault(event, str(error))

    def _next(self) -> Any:
        try:
            self._last = next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            said = error.problem or "it ends too early"
            problem = next(
                (ours for begin, ours in _PROBLEMS.items() if said.startswith(begin)), said
            )
            raise SpecError(f"{self._at(mark).text}: not valid YAML: {problem}") from None
        except yaml.reader.ReaderError as error:
            where = self._place(*_line_and_column(self._text, error.position)).text
            wrong = f"U+{error.character:04X}"
            raise SpecError(f"{where}: the character {wrong} is not text") from None
        except (ValueError, OverflowError):  # "\UFFFFFFFF", which PyYAML passes to chr()
            self._fault(self._last, "an escape in a string after this is not a character")
        return self._last

    def _at(self, mark: Any) -> SourcePosition:
        return self._place(mark.line, mark.column)

    def _fault(self, event: Any, sentence: str) -> NoReturn:
        raise SpecError(f"{self._at(event.start_mark).text}: {sentence}") from None


def _quick_document(text: str) -> dict[str, Any]:
    """The mapping in a YAML text, as `_YamlReader` reads it without positions.

    Raises:
        ValueError, OverflowError, yaml.YAMLError: it is not one that `_YamlReader` accepts.
    """
    if _OLD_LINE_BREAK.search(text):
        raise ValueError("a line break of YAML 1.1")
    events = yaml.CSafeLoader(text)
    following = events.get_event
    following()  # the stream's start
    following()  # the document's start, or the stream's end
    values = _quick_value(following, following(), 0)
    following()  # the document's end
    if not (isinstance(values, dict) and isinstance(following(), yaml.StreamEndEvent)):
        raise ValueError("not one mapping")
    return values


def _quick_value(following: Callable[[], Any], event: Any, depth: int) -> Any:
    kind = type(event)
    if kind not in _QUICK_EVENTS or event.anchor is not None or event.tag is not None:
        raise ValueError("an event of another kind, an anchor or a tag")
    if depth > DEEPEST_NESTING:
        raise ValueError("nested too deeply")
    if kind is yaml.ScalarEvent:
        return _plain_scalar(event.value) if not event.style else _whole_text(event.value)
    if kind is yaml.SequenceStartEvent:
        items = []
        while type(event := following()) is not yaml.SequenceEndEvent:
            items.append(_quick_value(following, event, depth + 1))
        return items
    entries: dict[str, Any] = {}
    while type(event := following()) is not yaml.MappingEndEvent:
        key = _quick_value(following, event, depth)
        if not isinstance(key, str) or key in entries:
            raise ValueError("a key that is no text, or is written twice")
        entries[key] = _quick_value(following, following(), depth + 1)
    return entries


_QUICK_EVENTS = {yaml.ScalarEvent, yaml.SequenceStartEvent, yaml.MappingStartEvent}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def scalar(text: str, *, none: tuple[str, ...] = ()) -> Any:
    """The value of unquoted `text` in YAML 1.2's core schema; the words in `none` are also null.

    Source: https://yaml.org/spec/1.2.2/#103-core-schema. A ValueError says what cannot be parsed.
    """
    if text in none:
        return None
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > LONGEST_INTEGER_DIGITS:
            raise ValueError(f"a whole number of {len(text)} digits is too long")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NO_NUMBER.fullmatch(text):
        return float(text.replace(".", ""))
    return _whole_text(text)


_plain_scalar = lru_cache(maxsize=4096)(scalar)
"""The same: the files of thousands of runs have nearly the same words."""


def _whole_text(text: str) -> str:
    """`text` with surrogate pairs joined, as JSON escapes them; half a pair is a ValueError."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("the text contains half a character (a lone surrogate)") from None


# ---- JSON and TOML

_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _json_as_yaml(text: str) -> str:
    """The same for a reader of YAML.

    Of its tabs none is inside a string, and of the characters that it escapes all of them are.
    """
    escaped = _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return escaped.replace("\t", " ")


def _check_json(text: str, *, source: str) -> None:
    def refuse(word: str) -> NoReturn:
        raise SpecError(f"{source}: not valid JSON: {word} is not a number in JSON")

    try:
        json.loads(text, parse_int=str, parse_float=str, parse_constant=refuse)
    except json.JSONDecodeError as error:
        at = f"{source}:{error.lineno}:{error.colno}"
        raise SpecError(f"{at}: not valid JSON: {error.msg[0].lower()}{error.msg[1:]}") from None
    except RecursionError:
        raise SpecError(f"{source}: nested deeper than {DEEPEST_NESTING} levels") from None


def _read_toml(text: str, *, source: str) -> Document:
    try:
        values: dict[str, Any] = _plain(tomllib.loads(text), steps=())
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        problem = found[1] if found else str(error)
        where = f"{source}:{found[2]}:{found[3]}" if found else source
        problem = problem[0].lower() + problem[1:]
        raise SpecError(f"{where}: not valid TOML: {problem}") from None
    except RecursionError:
        raise SpecError(f"{source}: nested deeper than {DEEPEST_NESTING} levels") from None
    except ValueError:  # Python's own limit
        raise SpecError(f"{source}: a whole number is too long") from None
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from None
    return _with_toml_places(values, text, source=source)


_TOML_LINE = re.compile(
    r"\s*(?:(?P<open>\[\[?)\s*(?P<table>[^\[\]]+?)\s*\]|(?P<key>[\w.\"'-]+)\s*=\s*)"
)


_TOML_LONG_STRING = re.compile(r'"{3}.*?"{3}|\'{3}.*?\'{3}', re.DOTALL)


def _only_its_lines(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


def _with_toml_places(values: dict[str, Any], text: str, *, source: str) -> Document:
    """Positions of the tables and of the keys at the start of a line; inner values take theirs."""
    top = _in_file(source, 0, 0)
    keys: dict[Steps, SourcePosition] = {(): top}
    contents: dict[Steps, SourcePosition] = {(): top}
    table: Steps = ()
    begun: Counter[Steps] = Counter()
    for number, line in enumerate(_TOML_LONG_STRING.sub(_only_its_lines, text).split("\n")):
        if not (found := _TOML_LINE.match(line)):
            continue
        if found["table"]:
            table = here = _toml_table(found, values, begun)
            first, begin = found.start("table"), found.start("open")
        else:
            here = (*table, *_toml_names(found["key"]))
            first, begin = found.start("key"), found.end()
        if find(values, here) is not None:
            keys[here] = _in_file(source, number, first)
            contents[here] = _in_file(source, number, begin)
    return Document(values, keys, contents, source)


def _toml_names(text: str) -> list[str]:
    return [name.strip(" \"'") for name in text.split(".")]


def _toml_table(found: re.Match[str], values: dict[str, Any], begun: Counter[Steps]) -> Steps:
    """The steps to a table; in a list of tables each `[[name]]` starts the next one."""
    steps: Steps = ()
    for name in _toml_names(found["table"]):
        steps = (*steps, name)
        if isinstance(find(values, steps), list):
            begun[steps] += found["open"] == "[[" and found["table"].endswith(name)
            steps = (*steps, begun[steps] - 1)
    return steps


def _plain(value: Any, *, steps: Steps) -> Any:
    """A copy of `value` with plain types only; a SpecError names any other."""
    key = dotted(steps)
    if len(steps) > DEEPEST_NESTING:
        raise SpecError(f"{key}: nested deeper than {DEEPEST_NESTING} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and len(f"{int(value):x}") <= LONGEST_INTEGER_DIGITS:
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        try:
            return _whole_text(str(value))
        except ValueError as error:
            raise SpecError(f"{key}: {error}") from None
    if isinstance(value, list | tuple):
        return [_plain(item, steps=(*steps, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _plain_entries(value, steps=steps)
    kind = "a huge number" if isinstance(value, int) else f"of type {type(value).__name__}"
    name = getattr(value, "__name__", None)
    hint = f"; give its name, such as '__main__:{name}'" if callable(value) and name else ""
    raise SpecError(
        f"{key}: must be null, a truth value, a number, text, a list or a mapping, but is {kind}"
        f"{hint}"
    )


def _plain_entries(mapping: Mapping[Any, Any], *, steps: Steps) -> dict[str, Any]:
    for key in mapping:
        if not isinstance(key, str):
            where = f"{dotted(steps)}: " if steps else ""
            raise SpecError(f"{where}a key must be text, but is {shown(key)}")
    return {str(key): _plain(value, steps=(*steps, str(key))) for key, value in mapping.items()}


# ---- overrides


def _override_value(content: str, text: str) -> Any:
    if content.startswith(("[", "{", "'", '"')):
        # An override is one line: it is shown completely, without a column.
        place = SourcePosition(0, 0, 0, text)
        return _YamlReader(content, place=lambda *_: place, none=("None",)).read()
    try:
        return scalar(content, none=("None",))
    except ValueError as error:
        raise SpecError(f"{text}: {error}") from None


def _with(container: Any, names: Sequence[str], setting: Setting, *, before: Steps) -> Any:
    """A copy of `container` with the value at `names`; missing levels are created."""
    if not names:
        return setting.value
    name, *rest = names
    if container is None:
        container = [] if len(before) < setting.written and _index(name) is not None else {}
    if isinstance(container, dict):
        inner = _with(container.get(name), rest, setting, before=(*before, name))
        return {**container, name: inner}
    if not isinstance(container, list):
        raise SpecError(
            f"{setting.text}: {dotted(before)} is {shown(container)} and has nothing inside"
        )
    at = _index(name)
    if at is None or at > len(container):
        raise SpecError(
            f"{setting.text}: {dotted(before)} is a list of {len(container)}, counted from 0; "
            f"{name!r} is neither one of them nor the next"
        )
    old = container[at] if at < len(container) else None
    inner = _with(old, rest, setting, before=(*before, at))
    return [*container[:at], inner, *container[at + 1 :]]


def _index(name: str) -> int | None:
    return int(name) if re.fullmatch("[0-9]{1,9}", name) else None


def _steps(values: Any, names: Sequence[str]) -> Steps:
    steps: Steps = ()
    for name in names:
        inside = find(values, steps)
        steps = (*steps, int(name) if isinstance(inside, list) else name)
    return steps


def _with_place(
    document: Document, values: dict[str, Any], steps: Steps, place: SourcePosition
) -> Document:
    def outside(places: dict[Steps, SourcePosition]) -> dict[Steps, SourcePosition]:
        return {other: at for other, at in places.items() if other[: len(steps)] != steps}

    made = [steps[:n] for n in range(1, len(steps)) if find(document.values, steps[:n]) is None]
    here = dict.fromkeys([*made, steps], place)
    return Document(
        values,
        keys=outside(document.keys) | here,
        contents=outside(document.contents) | here,
        source=document.source,
        overrides=document.overrides + 1,
    )


# ---- words


def dotted(steps: Steps) -> str:
    """`optimizer.groups.0.lr`, as overrides and messages write it."""
    return ".".join(map(str, steps))


def shown(value: Any) -> str:
    """`value` for a message: as YAML, and shortened."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        text = text.replace("inf", ".inf").replace("nan", ".nan")
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
