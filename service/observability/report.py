"""The report: one self-contained page about one or several runs.

It needs no network and no other files; light and dark mode follow the reader's setting.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.basics.atomic_files import require_replaceable, without_link
from service.basics.errors import SpecError
from service.observability.charts import COLOURS, Line, chart, short, smoothed, step_axis
from service.observability.sweeps import Sweep, rows_of, table_of
from service.runs.directory import LATEST_TIME, change_in_words, is_number
from service.runs.goodput import each_of
from service.runs.history import Failure, History, differing
from service.spec.files import dump_values

TITLES = {
    "train/grad_norm": "Gradient norm",
    "train/rows_per_second": "Rows per second",
    "train/weight_per_second": "Weight per second",
    "train/data_wait": "Waiting for data (fraction)",
    "train/lr": "Learning rate",
    "system/peak_memory_gib": "Peak memory (GiB)",
    "system/tflops": "Operations (TFLOP/s)",
    "system/flop_utilization": "Operations (fraction of the peak)",
    "system/slowest_rank": "Rank for which the others wait",
    "system/slowest_ratio": "Duration of its passes, relative to the others",
}
SMOOTHED_FROM = 120
"""Number of points from which a training curve is drawn smoothed, over the faint raw curve."""


def write_report(histories: Sequence[History], file: Path, *, sweeps: Sequence[Sweep] = ()) -> None:
    """Write the page about these runs atomically, with a table for each sweep.

    Raises:
        SpecError: the file cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        require_replaceable(file)
        text = page(histories, now=time.time(), sweeps=sweeps)
        with open(
            partial, "w", encoding="utf-8", errors="backslashreplace", opener=without_link
        ) as written:
            written.write(text)
        os.replace(partial, file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise SpecError(f"-o: {file} cannot be written: {error.strerror}.") from error


def page(
    histories: Sequence[History],
    *,
    now: float,
    sweeps: Sequence[Sweep] = (),
    script: str = "",
    version: str = "",
) -> str:
    """The page as HTML; `now`, in seconds since 1970, is its creation time.

    Args:
        script: what a page that is served does besides; it may ask its own server.
        version: what that script compares with the version that its server has.
    """
    several = len(histories) > 1
    title = f"{len(histories)} runs" if several else histories[0].name
    body = [
        _header(title, histories, now),
        *map(_of_sweep, sweeps),
        _comparison(histories) if several else _tiles(histories[0]),
        '<section class="charts">' + "".join(_charts(histories)) + "</section>",
        _timeline(histories),
        *(_facts(history, alone=not several) for history in histories),
    ]
    return shell(title, "".join(body), script=script, version=version)


def shell(title: str, body: str, *, script: str = "", version: str = "") -> str:
    """A whole page with this body, the style and the script of the report."""
    main = f'<main data-version="{escape(version)}">' if version else "<main>"
    # Whatever a run's name or message contains, this page makes no request but to its own server.
    connects = "; connect-src 'self'; form-action 'self'" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; script-src 'unsafe-inline'{connects}\">"
        f"<title>{escape(title)} - evenstep</title><style>{_shipped('report.css')}</style></head>"
        f"<body>{main}{body}</main><script>{_shipped('report.js')}{script}</script></body></html>\n"
    )


def _shipped(name: str) -> str:
    return resources.files("service.observability").joinpath(name).read_text(encoding="utf-8")


def _header(title: str, histories: Sequence[History], now: float) -> str:
    if len(histories) == 1:
        pills = _pill(histories[0].state)
    else:
        pills = "".join(
            f'<span class="run c{n % COLOURS}"><i></i>{escape(label)} {_pill(h.state)}</span>'
            for n, (label, h) in enumerate(zip(_labels(histories), histories, strict=True))
        )
    return (
        f'<header><p class="mark">evenstep <b>report</b> <time>{_moment(now)}</time></p>'
        f'<h1>{escape(title)}</h1><p class="pills">{pills}</p></header>'
    )


def _pill(state: str) -> str:
    return f'<span class="pill {_kind(state)}">{escape(state)}</span>'


def _kind(state: str) -> str:
    """A state as the name of a class: `gave up` is `gave-up`."""
    return escape(state.replace(" ", "-"))


def _labels(histories: Sequence[History]) -> list[str]:
    """The names of the runs; with their path if two have the same name."""
    names = [history.name for history in histories]
    return [
        name if names.count(name) == 1 else history.place
        for name, history in zip(names, histories, strict=True)
    ]


# ---- numbers


def _tiles(history: History) -> str:
    tiles = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}'
        f"{f' <small>at {escape(more)}</small>' if more else ''}</dd></div>"
        for name, told in _figures(history)
        for value, _, more in [told.partition(" at ")]
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _figures(history: History) -> list[tuple[str, str]]:
    best, last = history.best, _last(history)
    of = f" of {history.steps:,}" if history.steps else ""
    figures = [("steps", f"{history.step:,}{of}")]
    if best is not None:
        figures.append((f"best {best.measure}", f"{short(best.value)} at step {best.step:,}"))
    figures += [(f"last {k}", short(v)) for k, v in last.items() if k.startswith("test/")]
    if "train/loss" in last:
        figures.append(("last train/loss", short(last["train/loss"])))
    speeds = _points(history, "train/rows_per_second")[:, 1]
    if not np.isnan(speeds).all():
        figures.append(("rows per second, median", short(float(np.nanmedian(speeds)))))
    figures.append(("time in attempts", _duration(history.seconds)))
    goodput = history.facts.get("account", {}).get("goodput")
    if goodput is not None:
        figures.append(("goodput", f"{goodput:.0%} of the time since the first start"))
    processes = dict.fromkeys(str(a.get("processes", "?")) for a in history.attempts)
    if processes:
        figures.append(("processes", ", ".join(processes)))
    return figures


def _last(history: History) -> dict[str, float]:
    return {key: float(values[-1]) for key, (_, values) in history.curves.of.items()}


def _comparison(histories: Sequence[History]) -> str:
    """One column for each run: its results, and the differences between specs and versions."""
    measured = [dict(_figures(history)) for history in histories]
    names = dict.fromkeys(name for figures in measured for name in figures)
    rows = [(name, [figures.get(name, "-") for figures in measured]) for name in names]
    specs = differing([{**h.spec, "name": None} for h in histories])
    facts = differing([_origin(history) for history in histories])
    heads = "".join(
        f'<th class="c{n % COLOURS}" scope="col"><i></i>{escape(label)}</th>'
        for n, label in enumerate(_labels(histories))
    )
    same = [("the same in all", ["-"] * len(histories))]
    return (
        '<section class="card"><h2>Side by side</h2><div class="scroll"><table class="compare">'
        f"<thead><tr><th></th>{heads}</tr></thead>{_rows(rows)}"
        f"{_rows(specs or same, 'Differences between the specs')}"
        f"{_rows(facts, 'Differences of the machines') if facts else ''}</table></div></section>"
    )


def _of_sweep(sweep: Sweep) -> str:
    """One line for each setting: the measures of its runs, over the seeds."""
    heads, lines = table_of(rows_of(sweep))
    told = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    cells = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        f'<section class="card"><h2>{escape(sweep.name)}: mean and deviation over seeds</h2>'
        f'<div class="scroll"><table class="compare"><thead><tr>{told}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div></section>"
    )


def _rows(rows: Iterable[tuple[str, list[str]]], head: str = "") -> str:
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    ]
    if head:
        lines.insert(0, f'<tr class="head"><th colspan="99" scope="colgroup">{escape(head)}</th>')
    return f"<tbody>{''.join(lines)}</tbody>"


def _origin(history: History) -> dict[str, Any]:
    git = history.facts.get("git") or {}
    commit = {"commit": str(git.get("commit"))[:12], "dirty": git.get("dirty")} if git else {}
    return {**history.facts.get("versions", {}), **commit}


# ---- curves


def _charts(histories: Sequence[History]) -> list[str]:
    keys = dict.fromkeys(key for history in histories for key in history.keys)
    named = [key for key in keys if re.fullmatch(r"test/[^/]+/loss", key)]
    losses: list[str] = [key for key in ("train/loss", "test/loss", *named) if key in keys]
    groups = {"Loss": losses} if losses else {}
    rest = [key for key in keys if key not in losses]
    for key in sorted(rest, key=lambda k: (not k.startswith("test/"), _rank(k))):
        groups.setdefault(_title(key), []).append(key)
    alone = histories[0] if len(histories) == 1 else None
    marks = [a["from_step"] for a in alone.attempts[1:]] if alone else []
    if not groups:
        return ['<p class="card none">Nothing was measured yet.</p>']
    steps = [h.curves.steps for h in histories if len(h.curves.steps)]
    x = step_axis(float(end) for each in steps for end in (each.min(), each.max()))
    return [
        chart(
            title,
            _lines(histories, members),
            x=x,
            marks=marks,
            may_be_log=title != TITLES["train/lr"],
        )
        for title, members in groups.items()
    ]


def _rank(key: str) -> int:
    known = list(TITLES)
    return known.index(_family(key)) if _family(key) in TITLES else len(known)


def _family(key: str) -> str:
    return "train/lr" if key.startswith("train/lr/") else key


def _title(key: str) -> str:
    family = _family(key)
    if family in TITLES:
        return TITLES[family]
    words = family.removeprefix("test/").replace("_", " ")
    return words[:1].upper() + words[1:] if family.startswith("test/") else family


def _lines(histories: Sequence[History], keys: Sequence[str]) -> list[Line]:
    """For several runs, one colour for each; for one run, one colour for each key."""
    lines = []
    for number, (name, history) in enumerate(zip(_labels(histories), histories, strict=True)):
        for place, key in enumerate(keys):
            points = _points(history, key)
            colour = number if len(histories) > 1 else place
            label = key if len(histories) == 1 else name if len(keys) == 1 else f"{name} {key}"
            if not len(points):
                continue
            if key.startswith("test/"):
                lines.append(Line(label, points, colour, "dots"))
            elif len(points) >= SMOOTHED_FROM and _family(key) != "train/lr":
                lines.append(Line(label, points, colour, "faint"))
                lines.append(Line(f"{label}, smoothed", smoothed(points), colour))
            else:
                lines.append(Line(label, points, colour))
    return lines


def _points(history: History, key: str) -> NDArray[np.float64]:
    """(step, value) for each measurement of `key` [N, 2]."""
    found = history.curves.of.get(key)
    return np.zeros((0, 2)) if found is None else np.column_stack(found)


# ---- time


def _timeline(histories: Sequence[History]) -> str:
    """Attempts, stops and failures of every run, from its own start on."""
    spans = [list(history.spans()) for history in histories]
    begins = [min((span[0] for span in of), default=0.0) for of in spans]
    ends = [
        max([span[1] for span in of] + [f.time for f in history.failures], default=begin)
        for of, history, begin in zip(spans, histories, begins, strict=True)
    ]
    whole = max([end - begin for begin, end in zip(begins, ends, strict=True)] + [1e-3])
    tracks = [
        f'<div class="track"><b>{escape(label)}</b><div>'
        + "".join(_bar(span, begin, whole) for span in of)
        + "".join(_flag(f.time, f.text, begin, whole) for f in history.failures)
        + "</div></div>"
        for label, history, of, begin in zip(
            _labels(histories), histories, spans, begins, strict=True
        )
    ]
    marks = "".join(
        f'<span style="left:{100 * n / 4:g}%">{_duration(whole * n / 4)}</span>' for n in range(5)
    )
    key = "".join(
        f'<span class="{_kind(s)}"><i></i>{escape(s)}</span>' for s in _outcomes(spans, histories)
    )
    return (
        f'<section class="card"><h2>Attempts</h2><div class="legend states">{key}</div>'
        f'<div class="timeline">{"".join(tracks)}<div class="track"><b></b>'
        f'<div class="times">{marks}</div></div></div></section>'
    )


def _outcomes(
    spans: Sequence[Sequence[tuple[float, float, str]]], all_: Sequence[History]
) -> list[str]:
    found = list(dict.fromkeys(outcome for of in spans for _, _, outcome in of))
    return found + (["failure report"] if any(history.failures for history in all_) else [])


def _bar(span: tuple[float, float, str], begin: float, whole: float) -> str:
    start, end, outcome = span
    left, width = 100 * (start - begin) / whole, 100 * (end - start) / whole
    told = f"{outcome} after {_duration(end - start)}, started {_moment(start)}"
    return (
        f'<i class="bar {_kind(outcome)}" style="left:{left:.3f}%;width:{width:.3f}%" '
        f'title="{escape(told)}"></i>'
    )


def _flag(moment: float, text: str, begin: float, whole: float) -> str:
    left = 100 * (moment - begin) / whole
    return f'<i class="flag" style="left:{left:.3f}%" title="{escape(text)}"></i>'


# ---- facts


def _facts(history: History, *, alone: bool) -> str:
    git = history.facts.get("git") or {}
    known = [
        ("directory", history.place),
        ("id", str(history.facts.get("id", "-"))),
        ("command", "evenstep " + " ".join(map(str, history.facts.get("command", ())))),
        *((name, str(value)) for name, value in history.facts.get("versions", {}).items()),
    ]
    if git:
        dirty = ", with uncommitted changes" if git.get("dirty") else ""
        known.append(("commit", f"{git.get('commit')}{dirty}"))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in known)
    diff = str(git.get("diff") or "")
    changed = f"<details><summary>uncommitted changes</summary><pre>{escape(diff)}</pre></details>"
    heading = "Details" if alone else f"Details of {history.name}"
    return (
        f'<section class="card"><h2>{escape(heading)}</h2>{_attempts(history)}'
        f"{_changes(history)}{_account(history)}{_failures(history)}"
        f'<div class="facts"><dl>{facts}</dl>'
        f"<details{' open' if alone else ''}><summary>spec, as resolved</summary>"
        f"<pre>{escape(dump_values(history.spec))}</pre></details>{changed if diff else ''}"
        "</div></section>"
    )


ATTEMPT = ("started", "ended", "outcome", "from_step", "to_step", "processes", "device", "host")


def _attempts(history: History) -> str:
    if not history.attempts:
        return ""
    # Values that a later version adds to an attempt are shown unchanged, if they are words or
    # numbers.
    more = dict.fromkeys(
        key
        for attempt in history.attempts
        for key, value in attempt.items()
        if key not in ATTEMPT and isinstance(value, str | int | float)
    )
    head = ("#", "begun", "lasted", "ended as", "steps", "processes", "device", "host", *more)
    body = []
    for number, (attempt, span) in enumerate(zip(history.attempts, history.spans(), strict=True)):
        start, end, outcome = span
        steps = f"{attempt.get('from_step', '?')} to {attempt.get('to_step', '?')}"
        cells = [str(number + 1), _moment(start), _duration(end - start), outcome, steps]
        cells += [str(attempt.get(key, "-")) for key in ("processes", "device", "host")]
        cells += [_cell(attempt.get(key, "-")) for key in more]
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f'<th scope="col">{escape(word.replace("_", " "))}</th>' for word in head)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _changes(history: History) -> str:
    """The changes of the spec during the run, their authors, and the origin of a fork."""
    told = [
        f"<li><time>{_moment(entry['time'])}</time> {escape(change_in_words(entry))}</li>"
        for entry in history.changes
    ]
    origin = history.facts.get("forked_from")
    if isinstance(origin, dict):
        words = f"forked from {origin.get('run')} ({origin.get('id')}) at step {origin.get('step')}"
        told.insert(0, f"<li>{escape(words)}</li>")
    if not told:
        return ""
    return f'<h3>Changes</h3><ul class="changes">{"".join(told)}</ul>'


def _account(history: History) -> str:
    """How each attempt and the run spent their time, including the time between attempts."""
    each = each_of(history.attempts)
    whole = history.facts.get("account", {}).get("seconds", {})
    if not each or not whole:
        return ""
    again = history.facts["account"].get("steps_again", 0)
    total = {"steps": sum(told["steps"] for told in each), "taken again": again, **whole}
    head = ("#", *total)
    body = []
    for name, told in [*((str(n + 1), told) for n, told in enumerate(each)), ("all", total)]:
        cells = [name, *(_spent(key, told.get(key, 0.0)) for key in total)]
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in head)
    return (
        f'<h3>Time accounting</h3><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _spent(key: str, value: float) -> str:
    return f"{value:,.0f}" if key in ("steps", "taken again") else _duration(value)


def _cell(value: str | int | float) -> str:
    return short(value) if isinstance(value, float) else str(value)


def _failures(history: History) -> str:
    if not history.failures:
        return ""
    told = "".join(
        f"<li><time>{_moment(failure.time)}</time> {escape(failure.text)}{_stacks(failure)}</li>"
        for failure in history.failures
    )
    return f'<h3>Failure reports</h3><ul class="failures">{told}</ul>'


def _stacks(failure: Failure) -> str:
    if not failure.stacks:
        return ""
    return f"<details><summary>stacks</summary><pre>{escape(failure.stacks)}</pre></details>"


def _moment(seconds: float) -> str:
    if not is_number(seconds, LATEST_TIME):  # the time of a file is arbitrary
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 86400:.1f} days"
