"""Writes launch/engines/kubernetes/pod/pod_fields.json: the fields of a pod template.

`python tests/pod_fields.py`: from the schemas of Kubernetes that kubernetes-validate carries.
A type is text, integer, boolean, quantity, anything, the name of an object, [type] for a list,
{type} for a mapping; "[type] by key" is a list that a patch merges by that key of its items.
`!` marks a required field, `+` one that the oldest version does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate

OLDEST, NEWEST = "1.31", "1.37"
FILE = Path(__file__).parents[1] / "launch/engines/kubernetes/pod/pod_fields.json"
ROOT = "io.k8s.api.core.v1.PodTemplateSpec"
PLAIN = {"string": "text", "integer": "integer", "boolean": "boolean", "number": "number"}
SPECIAL = {"Quantity": "quantity", "IntOrString": "integer or text", "Time": "text"}


def definitions(version: str) -> dict[str, Any]:
    place = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    text = (place / f"v{version}.0-local-strict/_definitions.json").read_text()
    found: dict[str, Any] = json.loads(text)["$defs"]
    return found


def name_of(reference: str) -> str:
    return reference.rpartition(".")[2]


def type_of(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = name_of(field["$ref"])
        return SPECIAL.get(name, "anything" if name == "FieldsV1" else name)
    kinds = field.get("type", [])
    (kind,) = [each for each in ([kinds] if isinstance(kinds, str) else kinds) if each != "null"]
    if kind == "array":
        key = field.get("x-kubernetes-patch-merge-key")
        return f"[{type_of(field['items'])}]" + (f" by {key}" if key else "")
    if kind == "object":
        return f"{{{type_of(field['additionalProperties'])}}}"
    return PLAIN[kind]


def referred(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        return own + [name for inner in value.values() for name in referred(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in referred(inner)]
    return []


def pod_fields() -> dict[str, dict[str, str]]:
    old, new = definitions(OLDEST), definitions(NEWEST)
    todo, seen = [ROOT], {}
    while todo:
        name = todo.pop()
        if name not in seen and "properties" in new[name]:
            seen[name] = new[name]
            todo += referred(new[name])
    table = {}
    for name in sorted(seen):
        known = old.get(name, {}).get("properties", {})
        required = seen[name].get("required", [])
        table[name_of(name)] = {
            key: type_of(field) + "!" * (key in required) + "+" * (key not in known)
            for key, field in sorted(seen[name]["properties"].items())
        }
    return table


def as_text() -> str:
    lines = [f"{json.dumps(name)}: {json.dumps(fields)}" for name, fields in pod_fields().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(as_text(), encoding="utf-8")
