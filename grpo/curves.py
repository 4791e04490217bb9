"""Learning curves: what metrics.jsonl has against the step, of one run, or of several drawn over each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from grpo.charts import COLOURS, Axes, style, thinned
from grpo.results import why_undefined
from grpo.tables import Table

MOST = 100  # points of a line
OUTLIERS = 100  # one in so many dots, at either end, does not stretch the axis

Points = list[tuple[int, float | None]]


def scalars(row: Mapping, settings: Mapping) -> dict[str, float | None]:
    """The numbers of a line of metrics.jsonl by name, `val/srcc` for one inside another; None where it is undefined.

    Besides them `unparsed/share`, of the answers of the step. With --beta 0, which has no reference, there is no `kl`.
    """
    found = dict(numbers({name: value for name, value in row.items() if name not in ("step", "val")}))
    found |= dict(numbers({"val": row["val"] or {}}))
    if "unparsed" in row:
        answers = round(row["tokens"] / row["length"])
        found["unparsed/share"] = sum(row["unparsed"].values()) / answers
    if settings.get("beta") == 0:
        found.pop("kl", None)
    return found


def numbers(values: Mapping, above: str = "") -> Iterator[tuple[str, float | None]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{above}{name}/")
        elif not isinstance(value, str):  # the reasons why a metric is undefined
            yield above + name, value


class Chart(NamedTuple):
    """What one drawing shows of a run. lines: scalars and their names in its legend; alone: not for comparing runs."""

    title: str
    unit: str
    lines: Mapping[str, str]
    note: str
    alone: bool = False


VALIDATION = Chart("validation", "", {"val/srcc": "SRCC", "val/plcc": "PLCC"}, "Higher is better.")
OTHERS = (
    Chart("KL", "nats", {"kl": "KL"}, "To the model that training began with, per token."),
    Chart("entropy", "nats", {"entropy": "entropy"}, "Of the policy, per token."),
    Chart("length", "tokens", {"length": "length"}, "Tokens of an answer."),
    Chart("truncated", "share", {"truncated": "truncated"}, "Of the answers, by --max-new-tokens."),
    Chart("unparsed", "share", {"unparsed/share": "unparsed"}, "Of the answers: those without a readable score."),
    Chart("score spread", "MOS points", {"score_std": "score spread"}, "Between videos, of their mean scores."),
    Chart("zero variance", "share", {"zero_variance": "zero variance"}, "Of the groups: with equal rewards."),
    Chart(
        "clipped",
        "share",
        {"clipped_low": "low", "clipped_high": "high"},
        "Of the tokens, in the last pass; none with --inner-epochs 1.",
    ),
    Chart("gradient norm", "", {"grad_norm": "gradient norm"}, "Before it is clipped."),
    Chart("learning rate", "", {"lr": "learning rate"}, "Of the step."),
    Chart("speed", "tokens per second", {"tokens_per_s": "speed"}, "Answer tokens over all the time of a step."),
)
WEIGHTED = "The weighted sum of the terms: comparable between runs with the same rewards only."
TERM = "Before its weight. Higher is better."
ABSENT = {"validation": "no step was validated.", "KL": "none, as --beta 0 has no reference."}


def charts(rows: Sequence[Mapping]) -> list[Chart]:
    """Those of any run, and one for each reward term of these lines."""
    terms = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    spread = {"reward/std": "weighted sum", **{f"rewards/{name}/std": name for name in terms}}
    return [
        VALIDATION,
        Chart("reward", "", {"reward/mean": "reward"}, WEIGHTED),
        *(Chart(f"reward: {name}", "", {f"rewards/{name}/mean": f"reward: {name}"}, TERM) for name in terms),
        Chart("spread of rewards", "", spread, "Standard deviation over all answers of a step.", alone=True),
        *OTHERS,
    ]


def curves(results: Mapping[str, dict]) -> list[dict]:
    """Charts of several runs: `title`, `axes`, `lines` with `points` and `style`, `notes`; a line a run.

    results: see `read_result`, by name; the k-th has the k-th style in every chart. Of a run without a reference there
    is no KL.
    """
    styles = {name: style(index) for index, name in enumerate(results)}
    values = {
        name: [(row["step"], scalars(row, result["settings"])) for row in result["steps"]]
        for name, result in results.items()
    }
    found = []
    for chart in charts([row for result in results.values() for row in result["steps"]]):
        for scalar, label in chart.lines.items() if not chart.alone else ():
            lines, notes = {}, [chart.note]
            for name, result in results.items():
                if scalar == "kl" and result["settings"].get("beta") == 0:
                    notes.append(f"{name}: {ABSENT['KL']}")
                lines[name] = points(values[name], scalar)
                notes += undefined(name, lines[name], result["steps"], scalar)
            title = chart.title if len(chart.lines) == 1 else f"{chart.title} {label}"
            found.append(drawing(title, lines, styles, notes))
    return [chart for chart in found if chart["lines"]]


def run_curves(rows: Sequence[Mapping], settings: Mapping) -> list[dict]:
    """Charts of one run, as `curves` has them, with `unit`; where a line is thinned, with its points as `dots`.

    `axes` is None where there is nothing to draw; the notes say why.
    """
    values, found = [(row["step"], scalars(row, settings)) for row in rows], []
    names = {name for _, of_step in values for name in of_step}
    for chart in charts(rows):
        lines, notes = {}, [chart.note]
        for scalar, label in chart.lines.items():
            lines[label] = points(values, scalar)
            notes += undefined(label, lines[label], rows, scalar)
        styles = {label: style(index) for index, label in enumerate(lines)}
        if names.intersection(chart.lines):
            found.append(drawing(chart.title, lines, styles, notes, dots=not chart.alone) | {"unit": chart.unit})
        elif chart.title in ABSENT:
            found.append({"title": chart.title, "axes": None, "lines": [], "notes": [ABSENT[chart.title]]})
    return found


def points(values: Sequence[tuple[int, Mapping]], scalar: str) -> Points:
    return [(step, of_step[scalar]) for step, of_step in values if scalar in of_step]


def undefined(name: str, values: Points, rows: Sequence[Mapping], scalar: str) -> list[str]:
    """At how many steps a line has no value; of a validation also why."""
    missing = sum(value is None for _, value in values)
    if not missing:
        return []
    found, metric = [row["val"] for row in rows if row["val"]], scalar.removeprefix("val/")
    reasons = sorted({why_undefined(val, metric) or "" for val in found} - {""}) if metric != scalar else []
    why = f": {'; '.join(reasons)}" if reasons else ""
    return [f"{name}: undefined at {missing} of {len(values)} steps{why}."]


def drawing(
    title: str, lines: Mapping[str, Points], styles: Mapping[str, dict], notes: Sequence[str], dots: bool = False
) -> dict:
    """A chart of lines that have at most MOST points, means of neighbours if need be; dots: with the others as dots."""
    known = {name: [(step, value) for step, value in line if value is not None] for name, line in lines.items()}
    known = {name: line for name, line in known.items() if line}
    size = max(1, math.ceil(max(map(len, known.values()), default=0) / MOST))
    notes = [*notes, f"Every point is the mean of {size} steps."] if size > 1 else notes
    drawn = [
        {
            "name": name,
            "style": styles[name],
            "points": thinned(line, size),
            "dots": line if size > 1 and dots else [],
        }
        for name, line in known.items()
    ]
    if not drawn:
        return {"title": title, "axes": None, "lines": [], "notes": notes}
    axes = around(drawn, [step for line in known.values() for step, _ in line])
    low, high = axes.y
    outside = [dot for line in drawn for dot in line["dots"] if not low <= dot[1] <= high]
    for line in drawn:
        line["dots"] = [dot for dot in line["dots"] if low <= dot[1] <= high]
    if outside:
        step, value = max(outside, key=lambda dot: max(low - dot[1], dot[1] - high))
        notes = [*notes, f"Dots not drawn: {len(outside)}, the farthest {value:.3g} at step {step}."]
    return {"title": title, "axes": axes, "lines": drawn, "notes": notes}


def around(drawn: Sequence[Mapping], steps: Sequence[int]) -> Axes:
    """Axes that hold the steps, the lines, and all dots but the outliers."""
    values = [value for line in drawn for _, value in line["points"]]
    for line in drawn:
        dots = sorted(value for _, value in line["dots"])
        values += dots[len(dots) // OUTLIERS : len(dots) - len(dots) // OUTLIERS]
    values = values if any(values) else [0.0, 1.0]
    return Axes.around(list(zip((min(steps), max(steps)), (min(values), max(values)))))


def phases(rows: Sequence[Mapping]) -> dict | None:
    """Seconds of a step by phase, as areas on each other: `axes`, `areas`, `notes`, and a `table`; None of no step.

    areas: `name`, `colour`, `points` of the upper end, the highest first. The smallest are drawn as one.
    """
    if not rows:
        return None
    totals: dict[str, float] = {}
    for row in rows:
        for name, seconds in row["phase_s"].items():
            totals[name] = totals.get(name, 0.0) + seconds
    large = sorted(totals, key=totals.get, reverse=True)[: COLOURS - 1]
    shown = [name for name in totals if name in large]
    others = [name for name in totals if name not in large]
    size = max(1, math.ceil(len(rows) / MOST))
    notes = ["Areas on each other, by phase.", *([f"Every point is the mean of {size} steps."] if size > 1 else [])]
    tops, areas = [0.0] * len(rows), []
    for colour, names in enumerate([*([name] for name in shown), *([others] if others else [])]):
        tops = [top + sum(row["phase_s"].get(name, 0.0) for name in names) for top, row in zip(tops, rows)]
        line = thinned([(row["step"], top) for row, top in zip(rows, tops)], size)
        line = [(line[0][0] + aside, line[0][1]) for aside in (-0.2, 0.2)] if len(line) == 1 else line
        areas.append({"name": ", ".join(names), "colour": colour, "points": line})
    steps, highest = [row["step"] for row in rows], max(y for _, y in areas[-1]["points"])
    axes = Axes.around([(steps[0], 0.0), (steps[-1], highest)])
    whole = sum(totals.values())
    cells = [[name, f"{seconds:.1f}", f"{100 * seconds / whole:.1f} %"] for name, seconds in totals.items()]
    table = Table("Where the time went", ("phase", "seconds", "share"), cells)
    return {"axes": axes, "areas": areas[::-1], "notes": notes, "table": table}
