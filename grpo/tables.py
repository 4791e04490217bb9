"""Tables of figures for a terminal and for a page: None is a dash, and a note under the table says why."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grpo.results import METRICS, why_undefined

NONE = "–"
DIRECTION = "↑ higher is better, ↓ lower is better; RMSE in MOS points, on the scale from 1 to 5."


class Table(NamedTuple):
    """header: names of columns, the first one that of the rows; rows: their cells as text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def as_text(table: Table) -> str:
    """Columns under each other, the first to the left and the others to the right."""
    lines = [[" ".join(cell.split()) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines]
    return "\n".join([table.title, *aligned, *table.notes])


def shown(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def metrics_table(title: str, first: str, results: Mapping[str, dict]) -> Table:
    """A row of metrics for each of `results`, under the name `first`: how many videos, figures, intervals, reasons."""
    names = [name for name in METRICS if any(name in metrics for metrics in results.values())]
    rows, notes = [], [DIRECTION]
    for row, metrics in results.items():
        cells = [figure(metrics, name) for name in names]
        rows.append([row, f"{metrics['scored']} of {metrics['listed']}", *cells])
        reasons: dict[str, list[str]] = {}
        for name in names:
            if metrics.get(name) is None:
                reasons.setdefault(why_undefined(metrics, name), []).append(METRICS[name][0])
        notes += [f"{row}: no {', '.join(missing)}: {reason}" for reason, missing in reasons.items()]
    levels = sorted({f"{found['level']:.0%}" for metrics in results.values() if (found := metrics.get("intervals"))})
    if levels:
        notes.insert(1, f"In brackets: the {' or '.join(levels)} interval from resampling the videos.")
    return Table(title, [first, "scored", *map(heading, names)], rows, notes)


def means_table(means: Mapping[str, dict]) -> Table:
    """means: metrics over several data sets by their domain; in `left_out`, by metric, those that have no value."""
    table = metrics_table("Means, weighted by the videos that have a score", "data sets", means)
    notes = [
        f"{domain}: {METRICS[name][0]} without {', '.join(datasets)}"
        for domain, metrics in means.items()
        for name, datasets in metrics.get("left_out", {}).items()
        if name in METRICS
    ]
    return table._replace(notes=[*table.notes, *notes])


def heading(name: str) -> str:
    label, higher_is_better = METRICS[name]
    return f"{label} {'↑' if higher_is_better else '↓'}"


def figure(metrics: dict, name: str) -> str:
    interval = (metrics.get("intervals") or {}).get(name)
    return shown(metrics.get(name)) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def mean_and_range(values: Sequence[float | None]) -> str:
    """Mean and, in brackets, lowest to highest of the values that are defined; how many are not.

    >>> mean_and_range([0.5, None, 0.7])
    '0.600 (0.500 to 0.700), 1 undefined'
    """
    known = [value for value in values if value is not None]
    parts = [f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})"] if known else []
    return ", ".join(parts + ([f"{len(values) - len(known)} undefined"] if len(known) < len(values) else []))


def as_markdown(table: Table) -> str:
    """A GitHub table, with its notes as paragraphs behind it; without its title."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (table.header, *table.rows)]
    lines.insert(1, ["---"] * len(table.header))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "".join(f"\n\n{note}" for note in table.notes)
