"""Metrics and their intervals against scipy and against slow versions written out in loops."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from scipy import optimize

from rewards.metrics import correlations
from rewards.resamples import METRICS

# ---- slow versions


def slow_ranks(values):
    """Average ranks by counting."""
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


def slow_pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def slow_kendall(x, y):
    """Tau-b by looking at every pair."""
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    sign = lambda v: (v > 0) - (v < 0)  # noqa: E731
    a, b = [sign(x[i] - x[j]) for i, j in pairs], [sign(y[i] - y[j]) for i, j in pairs]
    return sum(p * q for p, q in zip(a, b)) / math.sqrt(sum(map(abs, a)) * sum(map(abs, b)))


def slow_rmse(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y)) / len(x))


def slow_fit(x, y, low, high):
    """Residuals' least sum of squares under the four-parameter logistic, and PLCC: scipy from many starts.

    The curve increases, and its midpoint and width keep within the module's limits for scores from `low` to `high`.
    """
    x, y, span = np.array(x), np.array(y), high - low

    def curve(p):
        return p[0] + p[1] / (1 + np.exp(-(x - p[2]) / p[3]))

    box = [(-np.inf, np.inf), (0, np.inf), (low - span, high + span), (span / 100, 10 * span)]
    starts = itertools.product(np.linspace(low - span / 2, high + span / 2, 9), (0.02, 0.1, 0.5, 3))
    fits = [
        optimize.least_squares(
            lambda p: curve(p) - y,
            (min(y), max(y) - min(y), b3, b4 * span),
            bounds=tuple(zip(*box)),
            x_scale=(1, 1, span, b4 * span),
            ftol=1e-13,
            xtol=1e-13,
            gtol=1e-13,
        )
        for b3, b4 in starts
    ]
    best = min(fits, key=lambda fit: fit.cost)
    return math.sqrt(2 * best.cost / len(x)), slow_pearson(curve(best.x), y)


@pytest.mark.parametrize("slope", [1, -1])
def test_correlations_equal_slow_versions_with_ties_and_unscored_videos(slope):
    rng = random.Random(0)
    mos = [rng.uniform(1, 5) for _ in range(40)]
    scores = [round(min(5, max(1, 3 + slope * (m - 3) + rng.gauss(0, 0.7))), 1) for m in mos]
    given = [None if k % 7 == 0 else s for k, s in enumerate(scores)]
    x = [s for s in given if s is not None]
    y = [m for s, m in zip(given, mos) if s is not None]
    found = correlations(given, mos)
    assert found["srcc"] == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)))
    assert found["plcc"] == pytest.approx(slow_pearson(x, y))
    assert found["krcc"] == pytest.approx(slow_kendall(x, y))
    assert found["rmse"] == pytest.approx(slow_rmse(x, y))
    assert (found["scored"], found["listed"]) == (len(x), 40) and found["coverage"] == len(x) / 40
    assert found["srcc"] * slope > 0


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([], "no scored"),
        ([None] * 5, "no scored"),
        ([1.0, 2.0, None], "fewer than 3"),
        ([3.0, 3.0, 3.0, 3.0], "all scores are equal"),
    ],
)
def test_undefined_correlations_are_none_with_a_reason(scores, reason):
    found = correlations(scores, [1.0, 2.0, 3.0, 4.0, 5.0][: len(scores)])
    for name in METRICS:
        if name != "rmse":
            assert found[name] is None and reason in found["undefined"][name]
    assert (found["rmse"] is None) == (reason == "no scored") == ("rmse" in found["undefined"])
    json.dumps(found, allow_nan=False)
