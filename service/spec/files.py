"""A spec as a file: read with the position of every error, written, described."""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import Discriminator, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from service.basics.atomic_files import is_utf_8
from service.basics.errors import SpecError, did_you_mean, printable
from service.spec.documents import (
    Document,
    Setting,
    SourcePosition,
    Steps,
    dotted,
    find,
    override,
    scalar,
    setting_of,
    shown,
)
from service.spec.extending import (
    EXTENDS,
    read_as_scalars,
    read_spec_file,
    rivals_of,
    with_environment,
    with_set_file,
)
from service.spec.models import Spec
from service.spec.part import CUSTOM, PATTERNS_IN_WORDS, Part

# ---- read


Override = str | Path
"""`key.sub=value`, or a file of such values, in the format of a spec."""


def load_spec(
    path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    overrides: Iterable[Override | Setting] = (),
) -> Spec:
    """The spec in a file, or in a mapping, with overrides applied in order.

    A file may extend another one, `extends: base.yaml`. An override is `key.sub=value`, or the
    path of a file of such values. If the file sets a duration in one unit (`every_epochs`) and
    an override in another (`every_steps`), the override applies.

    A `SpecError` lists all errors together, as `file:line:column: key: what is wrong`. A task in a
    file, `./my_task.py:task`, and texts that begin with `./` or `../` in `task_args` or `init.from`
    are relative to the directory of the file that contains them, and in an override or a
    mapping to the current one; in the result such paths are absolute.
    """
    document = read_spec_file(path)
    refused: list[str] = []
    for given in overrides:
        try:
            document = _overridden(document, given)
        except SpecError as error:
            refused.append(str(error))
    spec, document = _validated(document, refused)

    def folder(steps: Steps) -> str:
        return document.place_of_key(steps).folder

    arguments = _with_paths(spec.task_args, ("task_args",), lambda t, at: _joined(t, folder(at)))
    spec = spec.model_copy(update={"task_args": arguments})
    spec = with_source(spec, lambda text: _joined(text, folder(("init", "from"))))
    return with_code_files(spec, lambda file, at: _absolute(file, folder(at)))


def _validated(document: Document, refused: list[str]) -> tuple[Spec, Document]:
    """The spec of the document, and the document with environment variables replaced.

    Raises:
        SpecError: lists every error, and those in `refused`.
    """
    document, expanded, unset = with_environment(document)
    errors = _errors(document)
    if isinstance(errors, list) and expanded:
        # Text from the environment becomes a number if the key only accepts numbers.
        wrong = expanded & {_spot(error["loc"]).steps for error in errors}
        document = read_as_scalars(document, wrong)
        errors = _errors(document)
    found = [_Fault(*each) for each in unset]
    known = {(fault.place, fault.key) for fault in found}
    if isinstance(errors, list):
        found += [f for f in _faults(errors, document) if (f.place, f.key) not in known]
    found = sorted(dict.fromkeys(found), key=lambda fault: fault.place)
    if found or refused:
        raise SpecError("\n".join([*map(str, found), *refused]))
    assert isinstance(errors, Spec)
    return errors, document


def _errors(document: Document) -> Spec | list[ErrorDetails]:
    """The spec, or all of its errors."""
    try:
        return Spec.model_validate(document.values)
    except ValidationError as error:
        return error.errors(include_url=False)


def _overridden(document: Document, given: Override | Setting) -> Document:
    if isinstance(given, Path):
        return with_set_file(document, given)
    setting = setting_of(given) if isinstance(given, str) else given
    if setting.names[0] == EXTENDS:
        raise SpecError(
            f"{setting.text}: {EXTENDS} belongs in the file; use --set-file to add another one"
        )
    return _without_rivals(override(document, setting), setting.names)


def with_source(spec: Spec, path: Callable[[str], str]) -> Spec:
    """The spec with the source of its initial weights replaced by `path(source)`."""
    if spec.init is None:
        return spec
    init = spec.init.model_copy(update={"from": path(spec.init.source)})
    return spec.model_copy(update={"init": init})


def _without_rivals(document: Document, names: tuple[str, ...]) -> Document:
    """The document without the file's own value for the duration that the override has set."""
    *section, name = names
    held = find(document.values, tuple(section))
    if not isinstance(held, dict) or held.get(name) is None:
        return document
    for rival in rivals_of(name):
        steps = (*section, rival)
        place = document.place_of_key(steps)
        if rival in held and (place.override <= 0 or place.line):  # it is in a file
            document = override(document, setting_of(f"{dotted(steps)}="))
    return document


def with_files_where_they_are(spec: Spec, *, old: str, new: str) -> Spec:
    """The spec of a run that was started in directory `old` and is now in `new`.

    A file that is gone, but exists at the same path relative to the run, has moved with it.
    """

    def found(path: str) -> str:
        if not os.path.isabs(path) or os.path.exists(path):
            return path
        moved = os.path.normpath(os.path.join(new, os.path.relpath(path, old)))
        return moved if os.path.exists(moved) else path

    arguments = _with_paths(spec.task_args, (), lambda text, at: found(text))
    spec = with_source(spec.model_copy(update={"task_args": arguments}), found)
    return with_code_files(spec, lambda file, at: found(file))


_CODE: tuple[Steps, ...] = (
    ("task",),
    ("optimizer", "name"),
    ("optimizer", "companion", "name"),
    ("schedule", "name"),
)
"""Keys that may name the user's code, as `./file.py:name`."""


def code_files(spec: Spec) -> dict[Steps, str]:
    """The code files that the spec names, by key."""
    found = {}
    several = [("optimizers", name, *steps) for name in spec.optimizers for steps in _CODE[1:]]
    for steps in (*_CODE, *several):
        named = _named_at(spec, steps)
        if named is not None and (file := named.rpartition(":")[0]).endswith(".py"):
            found[steps] = file
    return found


def with_code_files(spec: Spec, path: Callable[[str, Steps], str]) -> Spec:
    """The spec with each such file replaced by `path(file, key)`."""
    for steps, file in code_files(spec).items():
        name = str(_named_at(spec, steps)).rpartition(":")[2]
        spec = _replaced(spec, steps, f"{path(file, steps)}:{name}")
    return spec


def _named_at(spec: Spec, steps: Steps) -> str | None:
    value: Any = spec
    for step in steps:
        inner = value.get(step) if isinstance(value, Mapping) else getattr(value, str(step), None)
        value = inner
    return None if value is None else str(value)


def _replaced(part: Any, steps: Steps, value: str) -> Any:
    key, *deeper = map(str, steps)
    if isinstance(part, Mapping):
        return {**part, key: _replaced(part[key], tuple(deeper), value)}
    inner = _replaced(getattr(part, key), tuple(deeper), value) if deeper else value
    return part.model_copy(update={key: inner})


def _with_paths(value: Any, steps: Steps, path: Callable[[str, Steps], str]) -> Any:
    """Plain values with each text replaced by `path(text, key)`."""
    if isinstance(value, str):
        return path(value, steps)
    if isinstance(value, Mapping):
        return {key: _with_paths(item, (*steps, key), path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        inner = [_with_paths(item, (*steps, at), path) for at, item in enumerate(value)]
        return tuple(inner) if isinstance(value, tuple) else inner
    return value


def _joined(text: str, folder: str) -> str:
    if not text.startswith(("./", "../")):
        return text  # relative to the current directory, or not a path: a name, a URL
    return _writable(os.path.abspath(os.path.join(folder, text)))


def _absolute(file: str, folder: str) -> str:
    return _writable(os.path.abspath(os.path.join(folder, os.path.expanduser(file))))


def _writable(path: str) -> str:
    """The path, which the spec of a run must be able to name.

    Raises:
        SpecError: its bytes are no text.
    """
    if not is_utf_8(path):
        raise SpecError(
            f"{printable(path)}: this path is not valid UTF-8, so spec.yaml could not name it, and "
            "the run could never resume. Rename the directory or file that has \\udc here."
        )
    return path


# ---- explain


class _Fault(NamedTuple):
    place: SourcePosition
    key: str
    sentence: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place.text, self.key, self.sentence) if part)


class _Spot(NamedTuple):
    """The position of one of pydantic's errors, in the user's own keys."""

    steps: Steps
    fields: dict[str, FieldInfo]
    """The valid keys next to the last one."""
    one_of_several: bool
    """One of the reasons why no member of a union matches; the others have the same steps."""


def _faults(errors: list[ErrorDetails], document: Document) -> Iterator[_Fault]:
    unions: dict[Steps, list[ErrorDetails]] = {}
    for error in errors:
        spot = _spot(error["loc"])
        if spot.one_of_several:
            unions.setdefault(spot.steps, []).append(error)
        else:
            yield _fault(error, spot, document)
    for steps, several in unions.items():
        allowed = " or ".join(_allowed(error) for error in several)
        sentence = _must_be(allowed, several[0]["input"])
        yield _Fault(document.place_of_value(steps), dotted(steps), sentence)


def _fault(error: ErrorDetails, spot: _Spot, document: Document) -> _Fault:
    steps, kind, given = spot.steps, error["type"], error["input"]
    name = str(steps[-1]) if steps else ""
    if kind.startswith("union_tag") and isinstance(given, Mapping):
        return _wrong_member(error, spot, document)
    if kind == "too_long" or (kind == "missing" and isinstance(steps[-1], int)):
        steps = steps if kind == "too_long" else steps[:-1]
        values = _tuple_length(spot.fields[str(steps[-1])].annotation)
        sentence = f"must have {values} values, but has {len(given)}"
    elif kind == "missing":
        return _Fault(
            document.place_of_key(steps), dotted(steps), _missing(name, spot.fields[name])
        )
    elif kind == "extra_forbidden":
        place = document.place_of_key(steps)
        known = spot.fields if len(steps) > 1 else [*spot.fields, EXTENDS]
        sentence = f"unknown key{did_you_mean(name, known)}"
        if place.override < 0:
            sentence += f"; to leave it out, write null for it in {document.source}"
        return _Fault(place, dotted(steps), sentence)
    elif kind == "evenstep":
        sentence = error["msg"]
    else:
        sentence = _must_be(_allowed(error), given) + _hint(error)
    return _Fault(document.place_of_value(steps), dotted(steps), sentence)


def _wrong_member(error: ErrorDetails, spot: _Spot, document: Document) -> _Fault:
    """The `name` that selects one of several sections is missing or unknown."""
    field = spot.fields[str(spot.steps[-1])]
    steps = (*spot.steps, "name")
    given = find(document.values, steps)
    if "name" not in error["input"]:
        example = field.examples[0] if field.examples else {"name": "..."}
        sentence = f"missing; add name: {example['name']}"
        return _Fault(document.place_of_key(steps), dotted(steps), sentence)
    known = [name for part in _parts(field.annotation) for name in _names(part)]
    if not isinstance(given, str):
        sentence = _must_be("text", given)
    elif "sgd" in known:
        allowed = f"an optimizer of torch.optim or {CUSTOM}"
        sentence = _must_be(allowed, given) + did_you_mean(given.lower(), set(known) - {CUSTOM})
    else:
        known = [*(name for name in known if name != CUSTOM), CUSTOM]
        told = _listed(known).replace(repr(CUSTOM), CUSTOM)
        sentence = _must_be(told, given) + _near(given, known)
    return _Fault(document.place_of_value(steps), dotted(steps), sentence)


def _missing(name: str, field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if len(choices) > 1:
        return f"missing; add {name}: {' or '.join(choices)}"
    if not field.examples:
        return "missing; add it"
    return f"missing; add {name}: {on_one_line(field.examples[0])}"


def _must_be(allowed: str, given: Any) -> str:
    return f"must be {allowed}, but is {shown(given)}"


_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_long": "at most {max_length} characters",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "union_tag_not_found": "a mapping of keys to values",
}


def _allowed(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return str(context["expected"])
    if error["type"] == "string_pattern_mismatch":
        return PATTERNS_IN_WORDS.get(context["pattern"], f"text like {context['pattern']}")
    words = _ALLOWED.get(error["type"])
    if words is None:  # pydantic's own message as a fallback
        return f"right ({error['msg']})"
    return words.format(**{key: _bare(value) for key, value in context.items()})


def _bare(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hint(error: ErrorDetails) -> str:
    given = error["input"]
    if error["type"] == "literal_error" and isinstance(given, str):
        return _near(given, [word.strip("'") for word in _words(error["ctx"]["expected"])])
    if error["type"] == "string_type" and isinstance(given, int | float):
        return "; put it in quotes"
    if error["type"].startswith("union_tag") and isinstance(given, str):
        return f"; write {{name: {given}}}"
    if error["type"].startswith(("model_", "dict_")) and given is None:
        return "; leave the key out for its default"
    return ""


def _words(listed: str) -> list[str]:
    return listed.replace(" or ", ", ").split(", ")


def _listed(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]])


def _near(word: str, names: list[str]) -> str:
    """A suggestion, without the list of names, which the sentence has already."""
    hint = did_you_mean(word, names)
    return hint if hint.startswith("; did") else ""


def _spot(loc: tuple[str | int, ...]) -> _Spot:
    """`loc` followed through the models, without the marks that pydantic adds at unions."""
    steps: Steps = ()
    parts: list[type[Part]] = [Spec]
    fields = dict(Spec.model_fields)
    chosen_by_name = keyed_by_user = False
    for step in loc:
        if isinstance(step, int):
            steps = (*steps, step)
        elif keyed_by_user and loc[-1] != "[key]":
            steps, keyed_by_user = (*steps, step), False
        elif chosen_by_name:
            parts = [p for p in parts if "name" not in p.model_fields or step in _names(p)]
            chosen_by_name = False
        elif keyed_by_user or not parts:
            return _Spot(steps, fields, one_of_several=True)
        else:
            steps = (*steps, step)
            fields = {key: field for part in parts for key, field in part.model_fields.items()}
            field = fields.get(step)
            parts = _parts(field.annotation) if field else []
            chosen_by_name = field is not None and _is_chosen_by_name(field)
            keyed_by_user = bool(parts and field and get_origin(field.annotation) is dict)
    return _Spot(steps, fields, one_of_several=False)


def _is_chosen_by_name(field: FieldInfo) -> bool:
    choices = [field, *get_args(field.annotation)]  # it may also be null
    marks = [mark for choice in choices for mark in getattr(choice, "__metadata__", ())]
    by_function = any(isinstance(extra, Discriminator) for extra in (*field.metadata, *marks))
    return by_function or field.discriminator is not None


def _parts(annotation: Any) -> list[type[Part]]:
    """The sections in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _parts(inner)]


def _tuple_length(annotation: Any) -> int:
    inner = get_args(annotation)
    if get_origin(annotation) is tuple:
        return len(inner)
    return max((_tuple_length(kind) for kind in inner), default=0)


def _names(part: type[Part]) -> tuple[str, ...]:
    """The values of `name` that select a section."""
    return get_args(part.model_fields["name"].annotation) or (CUSTOM,)


# ---- write


_last_dumped: tuple[Spec, str] | None = None


def dump_spec(spec: Spec) -> str:
    """The spec as YAML, including defaults; `load_spec` reads back an equal one."""
    global _last_dumped  # a run needs the text of its spec four times, and each time takes 5 ms
    if _last_dumped is None or _last_dumped[0] is not spec:
        _last_dumped = spec, _yaml(plain_values(spec))
    return _last_dumped[1]


def dump_values(values: Mapping[str, Any]) -> str:
    """Plain values of a spec as YAML, such as those in a run's `spec.yaml`."""
    return _yaml(dict(values))


def plain_values(value: Any, *, defaults: bool = True) -> Any:
    """Plain values of a section in the order of its fields; a field that is null is its default.

    Unlike pydantic's own `model_dump`, it keeps what is not finite, and an option that is null.

    Args:
        defaults: also those of fields that were not given.
    """
    if isinstance(value, Part):
        keys = [k for k in type(value).model_fields if defaults or k in value.model_fields_set]
        fields = {key: content for key in keys if (content := getattr(value, key)) is not None}
        value = fields | (value.model_extra or {})
    if isinstance(value, tuple | list):
        return [plain_values(item, defaults=defaults) for item in value]
    if isinstance(value, dict):
        return {key: plain_values(item, defaults=defaults) for key, item in value.items()}
    return value


def shown_values(spec: Spec) -> dict[str, Any]:
    """All values of a spec for readers of JSON, which has no number that is not finite: `.inf`.

    Trackers show them, and would show null.
    """

    def shown(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return on_one_line(value)
        if isinstance(value, dict):
            return {key: shown(item) for key, item in value.items()}
        return [shown(item) for item in value] if isinstance(value, tuple | list) else value

    values: dict[str, Any] = shown(spec.model_dump())
    return values


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would parse as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() and isinstance(scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def _yaml(value: Any, *, flow: bool | None = None) -> str:
    # Lines of any length, because folded strings are hard to read.
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=1 << 30,
        default_flow_style=flow,
    )


def on_one_line(value: Any) -> str:
    """A plain value as YAML on one line."""
    if isinstance(value, dict | list):
        return _yaml(value, flow=True).strip()
    return _yaml([value], flow=False).strip().removeprefix("- ")


def fingerprint(spec: Spec) -> str:
    """SHA-256 of the resolved spec."""
    return hashlib.sha256(dump_spec(spec).encode()).hexdigest()


# ---- describe


class _Schema(GenerateJsonSchema):
    """Without a title for every key, which an editor would show instead of the description."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def spec_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors.

    In a choice of sections each one requires its own `name`: if it were optional, an editor
    would match an unfinished section with several of them.
    """
    schema = Spec.model_json_schema(schema_generator=_Schema)
    for part in schema["$defs"].values():
        required = part.get("required", [])
        if "const" in part["properties"].get("name", {}) and "name" not in required:
            part["required"] = ["name", *required]
    _describe(schema)
    schema["properties"] = {EXTENDS: _EXTENDS_SCHEMA, **schema["properties"]}
    asked = {key: schema.pop(key) for key in ("required", "anyOf")}  # the base file may have them
    schema |= {"if": {"required": [EXTENDS]}, "else": asked}
    return schema


_EXTENDS_SCHEMA = {
    "description": "Another spec, relative to this file. Its values apply if this one has "
    "none. Sections are merged, other values are replaced, and `null` removes a key.",
    "type": "string",
}


def _describe(schema: dict[str, Any]) -> None:
    """Give each key the text below it in the source code as its description.

    pydantic could do this by itself whenever it builds a model: that took a third of the time.
    """
    parts: set[type[Part]] = {Spec, *_sections(Spec)}
    homes = {base for part in parts for base in part.__mro__ if issubclass(base, Part)}
    words: dict[str, dict[str, str]] = {}
    for file in sorted({str(inspect.getsourcefile(home)) for home in homes}):
        words |= _words_below(Path(file).read_text(encoding="utf-8"))
    for part in parts:
        told = schema if part is Spec else schema["$defs"][part.__name__]
        for key, value in told["properties"].items():
            below = (words.get(home.__name__, {}).get(key) for home in part.__mro__)
            text = value.get("description") or next(filter(None, below), None)
            section = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            if text not in (None, section.get("description")):
                told["properties"][key] = dict(sorted({**value, "description": text}.items()))


def _sections(part: type[Part]) -> Iterator[type[Part]]:
    """Every section that may occur in this one, at any depth."""
    for field in part.model_fields.values():
        for inner in _parts(field.annotation):
            yield inner
            yield from _sections(inner)


def _words_below(source: str) -> dict[str, dict[str, str]]:
    """The texts below the attributes of each class, by class and attribute."""
    found: dict[str, dict[str, str]] = {}
    for home in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for line, below in pairwise(home.body):
            match line, below:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(ast.Constant(str(text))):
                    found.setdefault(home.name, {})[key] = inspect.cleandoc(text)
    return found
