"""What runs of several settings and seeds differ by, and which differences are noise: tests, a table, a drawing.

Runs come by row and seed, as `{row: {seed: what `measured` gives}}`; the row BASELINE is what the others are compared
with.
"""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from grpo.charts import ticks, whole_ticks
from grpo.curves import scalars
from grpo.results import METRICS, read_json, read_lines
from grpo.tables import NONE, Table, mean_and_range, shown

BASELINE = "baseline"
SHOWN = ("srcc", "plcc", "rmse")
TESTED = ("srcc", "rmse")
LAST_STEPS = 20
LEVEL = 0.95

Runs = Mapping[str, Mapping[int, dict]]


class Difference(NamedTuple):
    """A metric minus the baseline's, over the seeds where both are defined; None where there are too few of them."""

    seeds: int
    mean: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    verdict: str


def measured(run: Path) -> dict[str, float | None]:
    """SHOWN on the test split, None where undefined; SRCC `before` training; and, of the answers sampled in the last
    steps, the share that is `readable`: that has a score.

    Raises ValueError naming a run that measured nothing.
    """
    summary = read_json(run / "summary.json")
    before, after = summary["before"], summary["after"]
    if after is None:
        raise ValueError(f"{run}: nothing was measured: the label file has no split 'test'")
    config = read_json(run / "config.json")
    steps = read_lines(run / "metrics.jsonl")[-LAST_STEPS:]
    readable = 1 - statistics.mean(scalars(step, config)["unparsed/share"] for step in steps)
    return {name: after[name] for name in SHOWN} | {"before": before["srcc"], "readable": readable}


def difference(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Difference:
    """Of two settings, by seed: the mean, its interval and p-value by Student's t of the paired differences.

    The verdict is whether the seeds alone can explain it.

    >>> difference({0: 0.7, 1: 0.8, 2: 0.9}, {0: 0.6, 1: 0.7})
    Difference(seeds=2, mean=0.1, interval=(0.1, 0.1), p_value=0.0, verdict='differs')
    """
    pairs = [(values[seed], baseline[seed]) for seed in values if seed in baseline]
    gaps = [round(a - b, 12) for a, b in pairs if a is not None and b is not None]
    n, mean = len(gaps), statistics.mean(gaps) if gaps else None
    missing = list(values.values()).count(None)
    if n < 2:
        few = "one seed" if n else "no baseline"
        return Difference(n, mean, None, None, f"undefined for {missing}" if missing else few)
    error = statistics.stdev(gaps) / math.sqrt(n)
    half = error * float(student.ppf((1 + LEVEL) / 2, n - 1))
    p_value = 2 * float(student.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    if missing:
        verdict = f"undefined for {missing}"
    elif mean == error == 0:
        verdict = "no difference"
    else:
        verdict = "within noise" if abs(mean) <= half else "differs"
    return Difference(n, mean, (mean - half, mean + half), p_value, verdict)


def differences(runs: Runs) -> dict[str, dict[str, Difference]]:
    """The metrics TESTED of each other row against the baseline's, by row; none if the baseline is not there."""
    if BASELINE not in runs:
        return {}

    def by_seed(row: str, metric: str) -> dict[int, float | None]:
        return {seed: found[metric] for seed, found in runs[row].items()}

    return {
        row: {metric: difference(by_seed(row, metric), by_seed(BASELINE, metric)) for metric in TESTED}
        for row in runs
        if row != BASELINE
    }


def table(runs: Runs) -> Table:
    tests, lines = differences(runs), []
    for row, seeds in runs.items():
        cells = [mean_and_range([found[metric] for found in seeds.values()]) for metric in SHOWN]
        readable = statistics.mean(found["readable"] for found in seeds.values())
        against = [in_words(tests[row][metric]) if row in tests else NONE for metric in TESTED]
        lines.append([row, str(len(seeds)), *cells, f"{readable:.3f}", *against])
    names = [METRICS[metric][0] for metric in SHOWN]
    header = ["row", "seeds", *names, "readable", *(f"{METRICS[metric][0]} minus baseline" for metric in TESTED)]
    before = mean_and_range([found["before"] for found in runs.get(BASELINE, {}).values()])
    notes = [
        f"Mean (lowest to highest) over the seeds, on the test split; the baseline's SRCC before training: {before}. "
        f"Readable: share of the sampled answers of the last {LAST_STEPS} steps that have a score.",
        f"Minus baseline: the {LEVEL:.0%} interval and p are those of Student's t on the differences of equal seeds. "
        "Within noise: the interval holds 0. This is about other seeds, not about other videos.",
        "p is that of one comparison: of 20 that change nothing, one is expected to differ.",
    ]
    if any(found.verdict.startswith("undefined") for row in tests.values() for found in row.values()):
        notes.append("Undefined: so many of the runs give all videos the same score, which has no correlation.")
    return Table("Ablation", header, lines, notes)


def in_words(found: Difference) -> str:
    """Everything about a difference, in a cell.

    >>> in_words(Difference(2, 0.1, (-0.05, 0.25), 0.2, "within noise"))
    '+0.100 [-0.050, +0.250], p 0.200: within noise'
    """
    if found.mean is None:
        return found.verdict
    interval = " [{:+.3f}, {:+.3f}], p {}".format(*found.interval, shown(found.p_value)) if found.interval else ""
    return f"{found.mean:+.3f}{interval}: {found.verdict}"


def drawing(runs: Runs, groups: Mapping[str, str]) -> dict:
    """What grpo/pages/ablation.svg draws: a line for each row, and in a panel for each metric TESTED its runs.

    groups: the group of each row; where it changes a new one `begins`.
    """
    tests, panels = differences(runs), []
    for metric in TESTED:
        lines = []
        for row, seeds in runs.items():
            values = [found[metric] for found in seeds.values() if found[metric] is not None]
            line = {"values": values, "mean": statistics.mean(values) if values else None}
            lines.append(line | {"verdict": tests[row][metric].verdict if row in tests else ""})
        low, high = whole_ticks([value for line in lines for value in line["values"]] or [0.0])
        panels.append({"name": METRICS[metric][0], "lines": lines, "low": low, "high": high, "ticks": ticks(low, high)})
    names = list(runs)
    begins = [bool(k) and groups[row] != groups[names[k - 1]] for k, row in enumerate(names)]
    baseline = names.index(BASELINE) if BASELINE in runs else None
    return {"rows": list(zip(names, begins)), "panels": panels, "baseline": baseline}
