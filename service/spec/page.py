"""The reference page of the spec, generated from the JSON Schema for editors. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_INTRODUCTION = """\
# The spec

One YAML file describes the job. It is checked strictly: an unknown key, a wrong type and a
duplicate key are errors. All errors are reported together, each with its line and column.
`key=value` on the command line replaces a value: `optimizer.lr=0.02`,
`optimizer.groups.0.lr=1e-4`; `max_grad_norm=` clears it. Scalars follow YAML 1.2: `1e-3` is a
number and `no` is text. A spec can also be a JSON or TOML file. Specs that share values:
[how](../how-to/share-a-spec.md).

`evenstep schema --page` prints this page. `evenstep schema` prints the JSON Schema for editors.
"""


def spec_page(schema: Schema) -> str:
    """Markdown with a table for each section, in the order of the spec."""
    parts = [_INTRODUCTION, _table(schema, schema, prefix="")]
    for name, inner in schema["properties"].items():
        parts += _sections(name, inner, schema)
    return "\n".join(parts).rstrip() + "\n"


def _sections(name: str, value: Schema, schema: Schema) -> Iterator[str]:
    members = _members(value, schema)
    if not members:
        yield from _by_name(name, value, schema)
        return
    yield f"\n## {name}\n\n{_words(value) or _words(members[0])}\n"
    if len(members) == 1:
        yield _table(members[0], schema, prefix=f"{name}.")
        for key, inner in members[0]["properties"].items():
            yield from _sections(f"{name}.{key}", inner, schema)
            for place, of_each in _sections_within(inner, schema):
                yield from _sections(f"{name}.{key}.{place}", of_each, schema)
    elif all("groups" in member["properties"] for member in members):
        yield from _optimizers(members, schema)
    else:
        for member in members:
            title = member["properties"]["name"].get("const", "package.module:name")
            yield f"\n### {name}: {title}\n\n{_words(member)}\n"
            yield _table(member, schema, prefix=f"{name}.")


def _sections_within(value: Schema, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The section of each item of a list, or of each value of a mapping, and its place."""
    found = [("0", value.get("items", {}))]
    found += [("NAME", each) for each in value.get("patternProperties", {}).values()]
    yield from ((place, each) for place, each in found if _members(each, schema))


def _by_name(name: str, value: Schema, schema: Schema) -> Iterator[str]:
    """A section of sections, each with a name that the user chooses."""
    each = value.get("additionalProperties")
    members = _members(each, schema) if isinstance(each, dict) else []
    if members:
        yield f"\n## {name}\n\n{_words(value)} Of each:\n"
        yield _table(members[0], schema, prefix=f"{name}.NAME.")


def _optimizers(members: list[Schema], schema: Schema) -> Iterator[str]:
    """The common keys, the keys of a group, and then the options of each optimizer."""
    common = _shared(members)
    common["name"] = {**common["name"], "type": "string"}
    common["name"].pop("const", None)
    yield _table({**members[0], "properties": common}, schema, prefix="optimizer.")
    groups = [_members(m["properties"]["groups"]["items"], schema)[0] for m in members]
    yield "\n### optimizer.groups\n\nThese keys, and the optimizer's own options, for each group:\n"
    prefix = "optimizer.groups.0."
    yield _table({**groups[0], "properties": _shared(groups)}, schema, prefix=prefix)
    yield "\n### The options of each optimizer\n\nMeaning and defaults are as in torch.optim.\n"
    yield "| name | options |\n|---|---|"
    for member in members:
        name = member["properties"]["name"].get("const", "package.module:Class")
        options = [
            f"`{key}` ({_type(value, schema)})"
            for key, value in member["properties"].items()
            if key not in common
        ]
        options += ["all options of the class"] * bool(member.get("additionalProperties"))
        yield f"| `{name}` | {', '.join(options)} |"


def _shared(parts: list[Schema]) -> Schema:
    """The keys that all of the sections have."""
    *others, last = (part["properties"] for part in parts)
    return {key: value for key, value in last.items() if all(key in other for other in others)}


def _table(part: Schema, schema: Schema, *, prefix: str) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    required = part.get("required") or part.get("else", {}).get("required", [])
    for key, value in part["properties"].items():
        default = "required" if key in required else _default(value, schema)
        words = _words(value) or next((_words(m) for m in _members(value, schema)), "")
        rows.append(f"| `{prefix}{key}` | {_type(value, schema)} | {default} | {words} |")
    return "\n".join(rows)


def _members(value: Schema, schema: Schema) -> list[Schema]:
    """The possible sections of a value; empty for a scalar, a list or any value."""
    choices = value.get("oneOf") or value.get("anyOf") or [value]
    found = [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]
    return [schema["$defs"][name] for name in found]


def _type(value: Schema, schema: Schema) -> str:
    if _members(value, schema):
        choices = value.get("oneOf") or value.get("anyOf") or []
        kinds = [_type(choice, schema) for choice in choices if "$ref" not in choice]
        return " or ".join([*(kind for kind in kinds if kind != "null"), "a section"])
    if "anyOf" in value:
        kinds = [_type(choice, schema) for choice in value["anyOf"]]
        return " or ".join(kind for kind in dict.fromkeys(kinds) if kind != "null")
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    kind = value.get("type", "anything")
    if kind == "array":
        items = value.get("items", {})
        return f"a list of {_type(items, schema)}" if items else "a list"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` or `false`",
        "string": "text",
        "object": "a mapping",
    }.get(kind, kind)
    return f"{words}{_bounds(value)}"


def _bounds(value: Schema) -> str:
    told = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    bounds = [
        words.format("2^63" if value[key] >= 2**53 else _number(value[key]))
        for key, words in told.items()
        if key in value
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _default(value: Schema, schema: Schema) -> str:
    default = value.get("default")
    if default is None or (_members(value, schema) and not isinstance(default, int)):
        return "-"
    if default in ([], {}):
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _words(value: Schema) -> str:
    return " ".join(str(value.get("description", "")).split()).replace("|", "\\|")
