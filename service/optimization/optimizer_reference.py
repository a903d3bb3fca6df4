"""The tables of the page on optimizers, generated from the code: run this module to write them."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

from service.optimization.optimizers import optimizer_class
from service.spec.optimizer_options import OPTIMIZERS, SOURCES
from service.spec.schedule import SCHEDULES, ScheduleSpec

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "optimizers.md"


def optimizer_table() -> str:
    """Every optimizer of torch.optim: its name in a spec, its options with their defaults."""
    lines = ["| name | options and their defaults | from |", "|---|---|---|"]
    for name in OPTIMIZERS:
        signature = inspect.signature(optimizer_class(name).__init__).parameters
        told = [f"`{option}: {_yaml(signature[option].default)}`" for option in _options(name)]
        lines.append(f"| `{name}` | {', '.join(told)} | {SOURCES[name]} |")
    return "\n".join(lines)


def _options(name: str) -> list[str]:
    return [option for option in OPTIMIZERS[name].options if option not in ("differentiable",)]


def schedule_table() -> str:
    """Every schedule: its name in a spec, what it does, its options with their defaults."""
    lines = ["| name | the rate after the warmup | options and their defaults |", "|---|---|---|"]
    shared = ScheduleSpec.model_fields
    for kind in SCHEDULES:
        fields = {name: field for name, field in kind.model_fields.items() if name not in shared}
        told = []
        for option, field in fields.items():
            required = field.is_required()
            told.append(f"`{option}`" if required else f"`{option}: {_yaml(field.default)}`")
        name = kind.model_fields["name"].annotation
        words = (kind.__doc__ or "").strip()
        lines.append(f"| `{name.__args__[0]}` | {words} | {', '.join(told) or '-'} |")  # type: ignore[union-attr]  # a Literal
    return "\n".join(lines)


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


TABLES = {"optimizers": optimizer_table, "schedules": schedule_table}


def with_tables(page: str) -> str:
    """The page with the table between each pair of marks regenerated."""
    for name, table in TABLES.items():
        begin = f"<!-- {name}: python -m service.optimization.optimizer_reference -->\n"
        end = f"\n<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        assert found and closed, f"{PAGE} has no place for the table of {name}"
        page = f"{before}{begin}{table()}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE} is up to date.\n")
