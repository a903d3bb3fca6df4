"""The Grafana dashboard of a run, k8s/grafana-dashboard.json: made by `kustomize` beside it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_RUN = '{run=~"$run"}'
_RANKS = '{run=~"$run", rank=~"$rank"}'


class Panel(NamedTuple):
    """One panel: its title, its queries with the name of each line, the unit, its kind."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8


PANELS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "The run",
        (
            Panel(
                "State",
                ((f"max by (run, state) (evenstep_state{_RUN} == 1)", "{{run}}: {{state}}"),),
                kind="stat",
                width=6,
            ),
            Panel(
                "Progress",
                ((f"evenstep_step{_RUN} / evenstep_steps{_RUN}", "{{run}}"),),
                unit="percentunit",
                kind="gauge",
                width=6,
            ),
            Panel(
                "Goodput",
                ((f"evenstep_goodput_ratio{_RUN}", "{{run}}"),),
                unit="percentunit",
                kind="stat",
                width=6,
            ),
            Panel(
                "Restarts", ((f"evenstep_restarts_total{_RUN}", "{{run}}"),), kind="stat", width=6
            ),
            Panel("Loss", ((f"evenstep_train_loss{_RUN}", "{{run}}"),), width=12),
            Panel("Tests", ((f"evenstep_test{_RUN}", "{{run}} {{measure}}"),), width=12),
            Panel("Gradient norm", ((f"evenstep_gradient_norm{_RUN}", "{{run}}"),)),
            Panel("Learning rate", ((f"evenstep_learning_rate{_RUN}", "{{run}} {{group}}"),)),
            Panel("Epoch", ((f"evenstep_epoch{_RUN}", "{{run}}"),)),
        ),
    ),
    (
        "Speed",
        (
            Panel("Rows a second", ((f"evenstep_rows_per_second{_RUN}", "{{run}}"),)),
            Panel("Weight a second (tokens)", ((f"evenstep_weight_per_second{_RUN}", "{{run}}"),)),
            Panel(
                "Waiting for data",
                ((f"evenstep_data_wait_ratio{_RUN}", "{{run}}"),),
                unit="percentunit",
            ),
            Panel(
                "Part of the devices' peak",
                ((f"evenstep_flop_utilization_ratio{_RUN}", "{{run}}"),),
                unit="percentunit",
            ),
            Panel(
                "Slowest rank",
                (
                    (f"evenstep_slowest_rank{_RUN}", "{{run}}: rank"),
                    (f"evenstep_slowest_rank_ratio{_RUN}", "{{run}}: times as long"),
                ),
            ),
            Panel(
                "Saves",
                (
                    (f"evenstep_save_stall_seconds{_RUN}", "{{run}}: training stopped"),
                    (f"evenstep_save_durable_seconds{_RUN}", "{{run}}: on disk"),
                ),
                unit="s",
            ),
        ),
    ),
    (
        "Ranks",
        (
            Panel(
                "Age of the heartbeat",
                (
                    (
                        f"time() - evenstep_rank_heartbeat_timestamp_seconds{_RANKS}",
                        "rank {{rank}}",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Without progress",
                ((f"evenstep_rank_standing_seconds{_RANKS}", "rank {{rank}}"),),
                unit="s",
            ),
            Panel(
                "Where the time goes",
                (
                    (
                        "sum by (work) (rate(evenstep_rank_work_seconds_total"
                        f"{_RANKS}[$__rate_interval]))",
                        "{{work}}",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Main memory",
                ((f"evenstep_rank_memory_bytes{_RANKS}", "rank {{rank}}"),),
                unit="bytes",
            ),
            Panel(
                "Peak memory of any process",
                ((f"evenstep_peak_memory_bytes{_RUN}", "{{run}}"),),
                unit="bytes",
            ),
            Panel("Health", ((f"min by (run) (evenstep_healthy{_RUN})", "{{run}}"),)),
        ),
    ),
)


def dashboard() -> str:
    """The dashboard as JSON, for Grafana's import or its sidecar."""
    content = {
        "title": "Evenstep",
        "uid": "evenstep-runs",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-6h", "to": "now"},
        "tags": ["training"],
        "templating": {"list": _variables()},
        "panels": _panels(),
    }
    return json.dumps(content, indent=1) + "\n"


def _variables() -> list[dict[str, Any]]:
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return [source, _variable("run", "evenstep_healthy"), _variable("rank", "evenstep_rank_step")]


def _variable(label: str, metric: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": f"label_values({metric}, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


_SOURCE = {"type": "prometheus", "uid": "${source}"}
_COLUMNS = 24
_HEIGHT = 8


def _panels() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    top = 0
    for title, panels in PANELS:
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        made.append({"id": len(made) + 1, "type": "row", "title": title, "gridPos": place})
        left, top = 0, top + 1
        for panel in panels:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + _HEIGHT
            made.append(_panel(panel, number=len(made) + 1, left=left, top=top))
            left += panel.width
        top += _HEIGHT
    return made


def _panel(panel: Panel, *, number: int, left: int, top: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
        for at, (query, legend) in enumerate(panel.queries)
    ]
    limits = {"min": 0, "max": 1} if panel.kind == "gauge" else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {"x": left, "y": top, "w": panel.width, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
        "targets": targets,
    }
