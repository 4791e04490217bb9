"""Learning curves of training runs, drawn over each other: what metrics.jsonl has against the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from grpo.charts import Axes, style, thinned

MOST = 100  # points of a line

Points = list[tuple[int, float | None]]


def validation(rows: Sequence[dict]) -> Points:
    return [(row["step"], row["val"]["srcc"]) for row in rows if row["val"]]


def reward(rows: Sequence[dict]) -> Points:
    return [(row["step"], row["reward"]["mean"]) for row in rows]


def term(rows: Sequence[dict], name: str) -> Points:
    return [(row["step"], row["rewards"][name]["mean"]) for row in rows if name in row["rewards"]]


def column(rows: Sequence[dict], name: str) -> Points:
    return [(row["step"], row[name]) for row in rows]


CURVES: dict[str, tuple[Callable[[Sequence[dict]], Points], str]] = {
    "validation SRCC": (validation, "Higher is better."),
    "reward": (reward, "The weighted sum of the terms: comparable between runs with the same rewards only."),
    "KL": (partial(column, name="kl"), "To the model that training began with, per token."),
    "entropy": (partial(column, name="entropy"), "Of the policy, per token."),
    "length": (partial(column, name="length"), "Tokens of an answer."),
}


def curves(results: Mapping[str, dict]) -> list[dict]:
    """A chart for each of CURVES and each reward term: `title`, `axes`, `lines` with `points` and `style`, `notes`.

    results: see `read_result`, by name; the k-th has the k-th style in every chart. Of a run without a reference there
    is no KL.
    """
    terms = dict.fromkeys(name for result in results.values() for row in result["steps"] for name in row["rewards"])
    found = CURVES | {
        f"reward: {name}": (partial(term, name=name), "Before its weight. Higher is better.") for name in terms
    }
    charts = []
    for title, (points_of, note) in found.items():
        known, notes = {}, [note]
        for name, result in results.items():
            if title == "KL" and result["settings"].get("beta") == 0:
                notes.append(f"{name}: none, as --beta 0 has no reference.")
                continue
            points = points_of(result["steps"])
            known[name] = [(step, value) for step, value in points if value is not None]
            if len(known[name]) < len(points):
                notes.append(f"{name}: undefined at {len(points) - len(known[name])} of {len(points)} steps.")
        size = max(1, math.ceil(max(map(len, known.values()), default=0) / MOST))
        if size > 1:
            notes.append(f"Every point is the mean of {size} steps.")
        styles = {name: style(index) for index, name in enumerate(results)}
        lines = [
            {"name": name, "style": styles[name], "points": thinned(points, size)}
            for name, points in known.items()
            if points
        ]
        if lines:
            axes = Axes.around([point for line in lines for point in line["points"]])
            charts.append({"title": title, "axes": axes, "lines": lines, "notes": notes})
    return charts
