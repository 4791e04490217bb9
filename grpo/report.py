"""The page about an evaluation: metrics, charts, the best and the worst predictions, and what has no score.

Knows the rows that an evaluation wrote, and no model: pictures and the logistic curve come in as functions.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from grpo.charts import Axes
from grpo.page import strip, write_page
from grpo.results import read_evaluation
from grpo.tables import NONE, Table, means_table, metrics_table, shown

BIN = 0.5  # MOS points: width of the bins of residuals and calibration; of the histogram half of it
EXTREMES = 10  # best and worst videos, each
FRAMES = 6  # pictures of one of them
DOMAINS = {"in": "in-domain", "ood": "out-of-domain"}

Frames = Callable[[str, str], Tensor | None]
Fit = Callable[[np.ndarray, np.ndarray], tuple[Callable[[np.ndarray], np.ndarray] | None, str | None]]


def write_report(folder: Path, file: Path, frames: Frames, fit: Fit) -> int:
    """Write the page about the evaluation in `folder` to `file`, and return its size in bytes.

    frames(dataset, path): the frames of a video, uint8 (F, 3, H, W), or None if it cannot be read.
    fit(scores, targets): the curve that maps scores (n,) to MOS (n,), and None; or None and the reason.
    Raises ValueError naming a file of the evaluation that is missing or wrong.
    """
    found = read_evaluation(folder)
    views = [view(name, found["predictions"][name], frames, fit) for name in found["datasets"]]
    about = {name: found.get(name) for name in ("model", "recipe", "scoring", "versions", "command")}
    tables = [metrics_table("Metrics of each data set", "data set", found["datasets"])]
    if found.get("means"):
        tables.append(means_table({DOMAINS[name]: mean for name, mean in found["means"].items()}))
    return write_page(file, "report.html", **about, tables=tables, datasets=views, pictures=pictures(views))


def view(name: str, rows: Sequence[dict], frames: Frames, fit: Fit) -> dict:
    """What the page shows of one data set; rows: see `read_predictions`."""
    scored = [row for row in rows if row["score"] is not None]
    best, worst = extremes(scored, EXTREMES)
    return {
        "name": name,
        "listed": len(rows),
        "scored": len(scored),
        "failures": failures(rows),
        "scatter": scatter(scored, fit),
        "residuals": residuals(scored),
        "calibration": calibration(scored),
        "histogram": histogram(scored),
        "best": [row | {"strip": strip(frames(name, row["path"]), FRAMES)} for row in best],
        "worst": [row | {"strip": strip(frames(name, row["path"]), FRAMES)} for row in worst],
    }


def pictures(views: Sequence[dict]) -> dict:
    """How many thumbnails are in the page, and their bytes as JPEG."""
    rows = [row for view in views for row in (*view["best"], *view["worst"])]
    sizes = [picture["bytes"] for row in rows for picture in row["strip"]["thumbnails"]]
    return {"number": len(sizes), "bytes": sum(sizes)}


def scatter(rows: Sequence[dict], fit: Fit) -> dict:
    """points: (score, target); curve: points of the fitted one from the lowest to the highest score, or `no_curve`."""
    scores, targets = (np.array([row[name] for row in rows]) for name in ("score", "target"))
    ends = bounds([*scores, *targets])
    curve, reason = fit(scores, targets) if rows else (None, None)
    places = np.linspace(scores.min(), scores.max(), 61) if curve else []
    return {
        "axes": Axes(ends, ends),
        "points": list(zip(scores.tolist(), targets.tolist())),
        "curve": list(zip(places, curve(places))) if curve else None,
        "no_curve": reason,
    }


def residuals(rows: Sequence[dict]) -> dict:
    """By bins of the MOS: how many, and mean and standard deviation (None of fewer than 2) of score - MOS."""
    bins = []
    for low, high, members in binned(rows, "target", BIN):
        errors = [row["score"] - row["target"] for row in members]
        deviation = statistics.stdev(errors) if len(errors) > 1 else None
        bins.append({"low": low, "high": high, "n": len(errors), "mean": statistics.fmean(errors), "std": deviation})
    ends = [(b["low"], b["mean"] + sign * (b["std"] or 0.0)) for b in bins for sign in (-1, 1)]
    axes = Axes(bounds([row["target"] for row in rows]), Axes.around([(0.0, 0.0), (1.0, 0.0), *ends]).y)
    rows = [[span(b["low"], b["high"]), str(b["n"]), f"{b['mean']:+.3f}", shown(b["std"])] for b in bins]
    header = ("MOS", "videos", "mean of score − MOS", "standard deviation")
    notes = [f"{NONE}: one video has no standard deviation."] if any(b["std"] is None for b in bins) else []
    return {"axes": axes, "bins": bins, "table": Table("Residuals in numbers", header, rows, notes)}


def calibration(rows: Sequence[dict]) -> dict:
    """By bins of the score: how many, mean score, mean MOS."""
    bins = [
        {
            "low": low,
            "high": high,
            "n": len(members),
            "score": statistics.fmean(row["score"] for row in members),
            "target": statistics.fmean(row["target"] for row in members),
        }
        for low, high, members in binned(rows, "score", BIN)
    ]
    ends = bounds([row[name] for row in rows for name in ("score", "target")])
    table = [[span(b["low"], b["high"]), str(b["n"]), shown(b["score"]), shown(b["target"])] for b in bins]
    header = ("score", "videos", "mean score", "mean MOS")
    return {"axes": Axes(ends, ends), "bins": bins, "table": Table("Calibration in numbers", header, table)}


def histogram(rows: Sequence[dict]) -> dict:
    """Numbers of scores and of MOS of the same videos, by bins half as wide."""
    bins = {name: binned(rows, name, BIN / 2) for name in ("score", "target")}
    counts = {name: [(low, high, len(members)) for low, high, members in found] for name, found in bins.items()}
    highest = max((count for found in counts.values() for *_, count in found), default=1)
    ends = bounds([row[name] for row in rows for name in ("score", "target")])
    lows = sorted({low for found in counts.values() for low, *_ in found})
    by_score, by_target = ({low: count for low, _, count in found} for found in counts.values())
    table = [[span(low, low + BIN / 2), str(by_score.get(low, 0)), str(by_target.get(low, 0))] for low in lows]
    numbers = Table("Histogram in numbers", ("from, to", "videos with such a score", "with such a MOS"), table)
    return {"axes": Axes(ends, Axes.around([(0, 0), (1, highest)]).y), **counts, "table": numbers}


def span(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


def binned(rows: Sequence[dict], name: str, width: float) -> list[tuple[float, float, list[dict]]]:
    """(low, high, rows with low <= value < high) of each bin that has rows, in order; the last one has its end too."""
    low, high = bounds([row[name] for row in rows])
    last = round((high - low) / width) - 1
    bins: dict[int, list[dict]] = {}
    for row in rows:
        bins.setdefault(min(last, math.floor((row[name] - low) / width)), []).append(row)
    return [(low + k * width, low + (k + 1) * width, bins[k]) for k in sorted(bins)]


def bounds(values: Sequence[float]) -> tuple[int, int]:
    """1 and 5, or further out where MOS that were mapped otherwise are beyond."""
    return min([1, *map(math.floor, values)]), max([5, *map(math.ceil, values)])


def extremes(rows: Sequence[dict], most: int) -> tuple[list[dict], list[dict]]:
    """The `most` rows with the smallest |score - MOS| and those with the largest, both from the end; none in both."""
    ranked = sorted(rows, key=error)
    best = ranked[: min(most, (len(ranked) + 1) // 2)]
    return best, ranked[len(best) :][::-1][:most]


def error(row: dict) -> float:
    return abs(row["score"] - row["target"])


def failures(rows: Sequence[dict]) -> dict[str, list[str]]:
    """The paths without a score by 'status: reason', the most frequent reason first."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["score"] is None:
            found.setdefault(f"{row['status']}: {row['reason']}", []).append(row["path"])
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
