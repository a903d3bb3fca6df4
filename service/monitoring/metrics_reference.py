"""The table of the page of metrics, made from the code: run this module to write it."""

from __future__ import annotations

from pathlib import Path

from service.monitoring.metrics import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
_BEGIN = "<!-- metrics: python -m service.monitoring.metrics_reference -->\n"
_END = "\n<!-- /metrics -->"


def table() -> str:
    """Every metric: its name in a query, its kind, its labels, what it is."""
    lines = ["| metric | kind | labels | what it is |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.sample}` | {metric.kind} | {labels} | {metric.about} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the table between its two marks made anew."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin, f"{PAGE} has no mark {_BEGIN.strip()}"
    assert end, f"{PAGE} has no mark {_END.strip()}"
    return f"{before}{begin}{table()}{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
