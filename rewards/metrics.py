"""How well scores agree with mean opinion scores (MOS): the field's metrics, and how far they can be trusted.

A score is a number, or None where the model gave none; no number ever stands in for it. See docs/metrics.md.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from rewards.logistic import fit_logistic
from rewards.resamples import METRICS, Resampled, resample_counts

FITTED_FROM = 5  # videos: a curve of four parameters meets four points exactly
ROUNDING = 1e-9  # a smaller difference of two models is none


def correlations(scores: Sequence[float | None], mos: Sequence[float]) -> dict:
    """The metrics over the videos that have a score; scores and MOS on one scale.

    Keys: `srcc` (Spearman), `krcc` (Kendall's tau-b), `plcc` (Pearson) and `rmse` of the scores as they are;
    `plcc_fitted` and `rmse_fitted` after the four-parameter logistic of `rewards.logistic`; `undefined`, metric -> why
    it is None; `scored`, `listed` and `coverage`, the share of videos with a score (None for an empty list).

    Raises ValueError if the lists differ in length or hold what is not a finite number.

    >>> correlations([1.0, 2.0, None, 4.0], [1.0, 3.0, 5.0, 4.0])["coverage"]
    0.75
    """
    x, y = _scored(scores, mos)
    values, undefined = {}, {}
    reason = _why_undefined(x, y)
    if reason:
        undefined = dict.fromkeys(METRICS, reason)
    else:
        values["srcc"] = stats.spearmanr(x, y).statistic
        values["plcc"] = stats.pearsonr(x, y).statistic
        values["krcc"] = stats.kendalltau(x, y).statistic
        curve, no_curve = (
            fit_logistic(x, y) if len(x) >= FITTED_FROM else (None, f"fewer than {FITTED_FROM} scored videos")
        )
        if curve:
            values["plcc_fitted"] = stats.pearsonr(curve(x), y).statistic
            values["rmse_fitted"] = _rmse(curve(x), y)
        else:
            undefined = dict.fromkeys(("plcc_fitted", "rmse_fitted"), no_curve)
    if len(x):
        values["rmse"] = _rmse(x, y)
        undefined.pop("rmse", None)
    result = {name: float(values[name]) if name in values else None for name in METRICS}
    counts = {"scored": len(x), "listed": len(mos), "coverage": len(x) / len(mos) if len(mos) else None}
    return result | {"undefined": undefined} | counts


def intervals(
    scores: Sequence[float | None],
    mos: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """Percentile bootstrap intervals over videos: metric -> [low, high].

    None where the metric itself is undefined, and for all with fewer than 3 scored videos.
    Videos are drawn with replacement from those that have a score; the logistic is fitted anew to each resample.
    `level` is the share of resamples inside; `left_out` is metric -> resamples in which it is undefined, which the
    interval leaves out.

    Raises ValueError as `correlations` does.
    """
    found = correlations(scores, mos)
    names = tuple(name for name in METRICS if found[name] is not None)
    result = dict.fromkeys(METRICS) | {"level": level, "left_out": {}}
    if found["scored"] < 3:
        return result
    resampled = Resampled(*_scored(scores, mos))
    parts = [resampled(counts, names) for counts in resample_counts(found["scored"], resamples, seed)]
    for name in names:
        values = np.concatenate([part[name] for part in parts])
        result[name], result["left_out"][name] = _interval(values, level), int(np.isnan(values).sum())
    return result


def paired_bootstrap(
    scores_a: Sequence[float | None],
    scores_b: Sequence[float | None],
    mos: Sequence[float],
    metric: str = "srcc",
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """Whether two models differ in one metric, on the videos that both scored.

    `difference` is a's metric less b's, `interval` its percentile bootstrap [low, high], both models being measured on
    the same resamples. `p_value` is two-sided, 2 min(P(d <= 0), P(d >= 0)) over the resamples' differences d with one
    added to both counts, at most 1. `videos` is how many both scored and `left_out` the resamples in which the metric
    of either is undefined. The first three are None, and `undefined` says why, where the metric is undefined on all.

    Raises ValueError for an unknown metric and as `correlations` does.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: choose among {', '.join(METRICS)}")
    _scored(scores_a, mos), _scored(scores_b, mos)
    both = [(a, b, m) for a, b, m in zip(scores_a, scores_b, mos) if a is not None and b is not None]
    a, b, y = np.array(both, dtype=float).reshape(-1, 3).T
    on_all = [correlations(x, y) for x in (a, b)]
    result = {"metric": metric, "difference": None, "interval": None, "p_value": None, "videos": len(both)}
    result |= {"left_out": 0, "undefined": None}
    reasons = [f"{name}: {found['undefined'][metric]}" for name, found in zip("ab", on_all) if found[metric] is None]
    if reasons or len(both) < 3:
        return result | {"undefined": "; ".join(reasons) or "fewer than 3 scored videos"}
    models = [Resampled(x, y) for x in (a, b)]
    parts = []
    for counts in resample_counts(len(both), resamples, seed):
        of_a, of_b = (model(counts, (metric,))[metric] for model in models)
        parts.append(of_a - of_b)
    values = np.concatenate(parts)
    values[np.abs(values) < ROUNDING] = 0
    known = values[~np.isnan(values)]
    tails = [(1 + np.count_nonzero(tail)) / (1 + len(known)) for tail in (known <= 0, known >= 0)]
    return result | {
        "difference": on_all[0][metric] - on_all[1][metric],
        "interval": _interval(values, level),
        "p_value": float(min(1.0, 2 * min(tails))),
        "left_out": len(values) - len(known),
    }


def weighted_mean(values: Mapping[str, float | None], videos: Mapping[str, int]) -> dict:
    """The mean of one metric over data sets, weighted by their scored videos.

    `mean` (None if no data set has a value), `videos`, the sum of the weights, and `left_out`, the data sets whose
    value is None.

    >>> weighted_mean({"a": 0.8, "b": 0.5, "c": None}, {"a": 20, "b": 10, "c": 5})
    {'mean': 0.7, 'videos': 30, 'left_out': ['c']}
    """
    known = {name: value for name, value in values.items() if value is not None}
    total = sum(videos[name] for name in known)
    mean = sum(value * videos[name] for name, value in known.items()) / total if total else None
    return {"mean": mean, "videos": total, "left_out": [name for name in values if name not in known]}


def _why_undefined(scores: np.ndarray, mos: np.ndarray) -> str | None:
    """Why no correlation of scores (n,) and MOS (n,) is defined; None if one is."""
    if len(scores) < 3:
        return "fewer than 3 scored videos" if len(scores) else "no scored videos"
    for name, column in (("scores", scores), ("MOS", mos)):
        if column.min() == column.max():
            return f"all {name} are equal"
    return None


def _scored(scores: Sequence[float | None], mos: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and MOS (n,) float64 of the videos that have a score."""
    if len(scores) != len(mos):
        raise ValueError(f"{len(scores)} scores for {len(mos)} MOS")
    for index, (score, target) in enumerate(zip(scores, mos)):
        if not ((score is None or math.isfinite(score)) and math.isfinite(target)):
            raise ValueError(f"video {index}: score {score}, MOS {target}: must be finite numbers")
    pairs = [(score, target) for score, target in zip(scores, mos) if score is not None]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x, y


def _rmse(x: np.ndarray, y: np.ndarray) -> float:
    return math.sqrt(np.mean((x - y) ** 2))


def _interval(values: np.ndarray, level: float) -> list[float] | None:
    """The middle share `level` of the values that are not NaN."""
    known = values[~np.isnan(values)]
    tail = (1 - level) / 2
    return np.quantile(known, [tail, 1 - tail]).tolist() if len(known) else None
