"""Metrics and their intervals against scipy and against slow versions written out in loops."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from scipy import optimize, stats

from rewards import logistic, resamples
from rewards.logistic import fit_logistic
from rewards.metrics import correlations, intervals, paired_bootstrap, weighted_mean
from rewards.resamples import METRICS, Resampled, resample_counts

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
    """RMSE and PLCC after the best increasing four-parameter logistic, as scipy finds it from many starts.

    Its limits for scores from `low` to `high` are those that the module states.
    """
    x, y, span = np.array(x), np.array(y), high - low

    def curve(p):  # base, height, place of the midpoint from -1 to 1, width in spans
        midpoint = (low + high) / 2 + p[2] * (span / 2 + 2 * p[3] * span)
        return p[0] + p[1] / (1 + np.exp(-(x - midpoint) / (p[3] * span)))

    fits = [
        optimize.least_squares(
            lambda p: curve(p) - y,
            (np.mean(y), np.ptp(y), place, width),
            bounds=((-np.inf, 0, -1, 0.01), (np.inf, np.inf, 1, 10)),
            x_scale=(1, 1, 1, width),
            ftol=1e-10,
            xtol=1e-10,
            gtol=1e-10,
        )
        for place, width in itertools.product((-0.5, 0, 0.5), (0.05, 0.5))
    ]
    best = min(fits, key=lambda fit: fit.cost)
    return math.sqrt(2 * best.cost / len(x)), slow_pearson(curve(best.x), y)


def scipy_metrics(x, y):
    """Those of the four raw metrics that are defined, by scipy."""
    found = {"rmse": slow_rmse(x, y)}
    if min(x) < max(x) and min(y) < max(y):
        tests = {"srcc": stats.spearmanr, "plcc": stats.pearsonr, "krcc": stats.kendalltau}
        found |= {name: float(test(x, y).statistic) for name, test in tests.items()}
    return found


def sample(kind, n, seed=0):
    """Scores and MOS of one kind, as lists."""
    rng = np.random.default_rng(seed)
    mos = rng.uniform(1, 5, n)
    scores = {
        "random": lambda: rng.uniform(1, 5, n),
        "close": lambda: mos + rng.normal(0, 0.5, n),
        "curved": lambda: 1 + 4 / (1 + np.exp(-3 * (mos - 3))) + rng.normal(0, 0.1, n),
        "steep end": lambda: np.log(mos) + rng.normal(0, 0.05, n),
        "reversed": lambda: 6 - mos + rng.normal(0, 0.2, n),
        "halves": lambda: np.round(2 * (mos + rng.normal(0, 0.5, n))) / 2,
        "three levels": lambda: np.clip(np.round(mos + rng.normal(0, 1, n)), 2, 4),
        "two levels": lambda: 1.0 + (mos + rng.normal(0, 1, n) > 3),
    }[kind]()
    if kind in ("halves", "three levels"):
        mos = np.round(mos, 1)
    return scores.tolist(), mos.tolist()


KINDS = ("random", "close", "curved", "steep end", "reversed", "halves", "three levels", "two levels")

# ---- correlations


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 4, 60])
def test_raw_metrics_are_scipys(kind, n):
    scores, mos = sample(kind, n)
    found, expected = correlations(scores, mos), scipy_metrics(scores, mos)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("n", [9, 60])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("random", "reversed")])
def test_fitted_metrics_are_those_of_the_best_of_many_fits(kind, n):
    scores, mos = sample(kind, n, seed=1)
    found = correlations(scores, mos)
    rmse, plcc = slow_fit(scores, mos, min(scores), max(scores))
    assert found["rmse_fitted"] == pytest.approx(rmse, rel=1e-6)
    assert found["plcc_fitted"] == pytest.approx(plcc, rel=1e-6)
    assert found["rmse_fitted"] <= found["rmse"] and found["undefined"] == {}


def test_a_curve_is_found_again():
    truth = logistic.Logistic(b1=4.6, b2=1.2, b3=2.9, b4=0.4)
    scores = np.linspace(1, 5, 50)
    curve, reason = fit_logistic(scores, truth(scores))
    assert reason is None and tuple(curve) == pytest.approx(tuple(truth), rel=1e-4)
    assert truth(2.9) == pytest.approx(2.9) and truth(3.3) == pytest.approx(1.2 + 3.4 / (1 + math.exp(-1)))


def test_reversed_scores_do_not_become_right_ones():
    """A curve that may fall turns a PLCC of -0.99 into 0.99; this one may not."""
    scores, mos = sample("reversed", 60)
    found = correlations(scores, mos)
    falling = lambda x, b1, b2, b3, b4: b2 + (b1 - b2) / (1 + np.exp(-(x - b3) / abs(b4)))  # noqa: E731
    best, _ = optimize.curve_fit(falling, scores, mos, (1, 5, 3, 1), maxfev=20_000)
    assert found["plcc"] < -0.98 and stats.pearsonr(falling(np.array(scores), *best), mos).statistic > 0.98
    assert found["plcc_fitted"] is found["rmse_fitted"] is None
    assert found["undefined"] == dict.fromkeys(
        ("plcc_fitted", "rmse_fitted"), "no increasing curve fits better than a constant"
    )


def test_a_fit_that_is_not_done_gives_no_number(monkeypatch):
    monkeypatch.setattr(logistic, "STEPS", 1)
    found = correlations(*sample("curved", 60))
    assert found["plcc_fitted"] is None and "did not converge" in found["undefined"]["rmse_fitted"]
    assert found["srcc"] is not None


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([], "no scored"),
        ([None] * 5, "no scored"),
        ([1.0, 2.0, None], "fewer than 3"),
        ([3.0, 3.0, 3.0, 3.0], "all scores are equal"),
        ([0.1, None, 0.1, 0.1, 0.1], "all scores are equal"),
    ],
)
def test_undefined_correlations_are_none_with_a_reason(scores, reason):
    found = correlations(scores, [1.0, 2.0, 3.0, 4.0, 5.0][: len(scores)])
    for name in METRICS:
        if name != "rmse":
            assert found[name] is None and reason in found["undefined"][name]
    assert (found["rmse"] is None) == (reason == "no scored") == ("rmse" in found["undefined"])
    json.dumps(found, allow_nan=False)


def test_equal_mos_and_too_few_videos_for_a_curve_are_told():
    found = correlations([1.0, 2.0, 3.0, 4.0, 5.0, 1.0], [2.0] * 6)
    assert {name for name in METRICS if found[name] is None} == found["undefined"].keys() == {*METRICS} - {"rmse"}
    assert set(found["undefined"].values()) == {"all MOS are equal"}
    found = correlations([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0])
    assert found["undefined"] == dict.fromkeys(("plcc_fitted", "rmse_fitted"), "fewer than 5 scored videos")


@pytest.mark.parametrize("measure", [correlations, intervals, lambda s, m: paired_bootstrap(m, s, m)])
@pytest.mark.parametrize(
    ("scores", "mos", "message"),
    [
        ([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], "video 1: score nan"),
        ([1.0, 2.0, -math.inf], [1.0, 2.0, 3.0], "video 2: score -inf"),
        ([None, 2.0, 3.0], [math.nan, 2.0, 3.0], "MOS nan"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "2 scores for 3 MOS"),
    ],
)
def test_what_is_no_number_is_refused(measure, scores, mos, message):
    with pytest.raises(ValueError, match=message):
        measure(scores, mos)


@pytest.mark.parametrize("kind", ["close", "halves", "reversed"])
def test_rank_metrics_keep_under_monotone_maps_and_all_under_another_order(kind):
    scores, mos = sample(kind, 50)
    found = correlations(scores, mos)
    mapped = correlations([math.exp(s) for s in scores], [m**3 for m in mos])
    falling = correlations([-s for s in scores], mos)
    for name in ("srcc", "krcc"):
        assert mapped[name] == pytest.approx(found[name]) == pytest.approx(-falling[name])
    assert mapped["plcc"] != pytest.approx(found["plcc"], rel=1e-3)
    shuffled = np.random.default_rng(0).permutation(50)
    again = correlations([scores[k] for k in shuffled], [mos[k] for k in shuffled])
    assert {n: again[n] for n in METRICS if found[n]} == pytest.approx({n: found[n] for n in METRICS if found[n]})


# ---- resamples


def test_counts_are_those_of_draws_with_replacement_whatever_the_size_of_a_part(monkeypatch):
    whole = np.concatenate(list(resample_counts(50, 400, seed=3)))
    monkeypatch.setattr(resamples, "AT_ONCE", 333)
    parts = list(resample_counts(50, 400, seed=3))
    assert max(map(len, parts)) == 6 and np.array_equal(np.concatenate(parts), whole)
    assert whole.shape == (400, 50) and (whole.sum(1) == 50).all()
    for times in (0, 1, 2, 3):  # binomial, 20,000 cells: five standard errors
        p = stats.binom.pmf(times, 50, 1 / 50)
        assert abs((whole == times).mean() - p) < 5 * math.sqrt(p / whole.size)
    assert not np.array_equal(np.concatenate(list(resample_counts(50, 400, seed=4))), whole)


@pytest.mark.parametrize("n", [3, 4, 9, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_resampled_metrics_are_scipys_of_the_resampled_lists(kind, n):
    scores, mos = map(np.array, sample(kind, n, seed=2))
    (counts,) = resample_counts(n, 12, seed=0)
    found = Resampled(scores, mos)(counts, ("srcc", "plcc", "krcc", "rmse"))
    for row, count in enumerate(counts):
        expected = scipy_metrics(np.repeat(scores, count), np.repeat(mos, count))
        known = {name: values[row] for name, values in found.items() if not np.isnan(values[row])}
        assert known == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["curved", "halves", "two levels"])
def test_the_curve_is_fitted_anew_to_every_resample(kind):
    scores, mos = map(np.array, sample(kind, 25, seed=3))
    (counts,) = resample_counts(25, 3, seed=0)
    found = Resampled(scores, mos)(counts, ("plcc_fitted", "rmse_fitted"))
    for row, count in enumerate(counts):
        rmse, plcc = slow_fit(np.repeat(scores, count), np.repeat(mos, count), min(scores), max(scores))
        assert found["rmse_fitted"][row] == pytest.approx(rmse, rel=1e-6)
        assert found["plcc_fitted"][row] == pytest.approx(plcc, rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("constant", ["scores", "mos"])
def test_a_resample_with_one_value_only_has_no_correlation(constant):
    equal, other = np.array([2.1, 2.1, 2.1, 3.0, 4.0]), np.array([1.0, 4.0, 2.0, 3.0, 5.0])
    columns = (equal, other) if constant == "scores" else (other, equal)
    found = Resampled(*columns)(np.array([[2, 1, 2, 0, 0], [1, 1, 1, 1, 1]]))
    assert {name for name in METRICS if np.isnan(found[name][0])} == {*METRICS} - {"rmse"}
    assert not any(np.isnan(found[name][1]) for name in METRICS)


@pytest.mark.filterwarnings("error")
def test_a_resample_that_lacks_the_one_far_score_is_measured_too():
    scores, mos = np.array([1, 1 + 1e-9, 1 + 2e-9, 1 + 3e-9, 5]), np.array([1.0, 2.0, 4.0, 3.0, 5.0])
    found = Resampled(scores, mos)(np.array([[1, 1, 1, 2, 0], [1, 1, 1, 1, 1]]))
    assert found["plcc"][0] == pytest.approx(slow_pearson([0, 1, 2, 3, 3], [1, 2, 4, 3, 3]), abs=1e-6)
    assert np.isnan(found["plcc_fitted"][0]) and found["plcc_fitted"][1] == pytest.approx(math.sqrt(0.5))  # a step


@pytest.mark.parametrize("kind", KINDS)
def test_every_video_once_gives_the_metrics_themselves(kind):
    scores, mos = sample(kind, 80)
    found = Resampled(np.array(scores), np.array(mos))(np.ones((1, 80), dtype=int))
    expected = {
        name: math.nan if value is None else value
        for name, value in correlations(scores, mos).items()
        if name in METRICS
    }
    assert {name: value for name, (value,) in found.items()} == pytest.approx(expected, nan_ok=True)


# ---- intervals and comparisons


def slow_draws(scores, mos, resamples, seed):
    """Raw metrics of the resampled lists, one dict a resample."""
    counts = np.concatenate(list(resample_counts(len(scores), resamples, seed)))
    return [scipy_metrics(np.repeat(scores, count), np.repeat(mos, count)) for count in counts]


@pytest.mark.parametrize(("n", "resamples"), [(4, 400), (40, 60)])
def test_intervals_are_percentiles_of_a_slow_loop(n, resamples):
    scores, mos = sample("halves", n)
    given, listed = [None, *scores, None], [1.0, *mos, 2.0]  # what has no score takes no part
    found = intervals(given, listed, resamples, seed=5, level=0.8)
    draws = slow_draws(scores, mos, resamples, seed=5)
    for name in ("srcc", "plcc", "krcc", "rmse"):
        values = sorted(draw[name] for draw in draws if name in draw)
        assert found["left_out"][name] == resamples - len(values)
        assert found[name] == pytest.approx([np.percentile(values, 10), np.percentile(values, 90)])
    assert (found["left_out"]["srcc"] > 0) == (n == 4)
    json.dumps(found, allow_nan=False)


def test_fitted_intervals_hold_the_metric_and_follow_the_seed():
    scores, mos = sample("curved", 60)
    measured, found = correlations(scores, mos), intervals(scores, mos, resamples=200)
    for name in METRICS:
        assert found[name][0] < measured[name] < found[name][1]
    assert intervals(scores, mos, resamples=200) == found
    assert intervals(scores, mos, resamples=200, seed=1)["srcc"] != found["srcc"]


def test_no_interval_where_the_metric_is_undefined():
    found = intervals(*sample("reversed", 30), resamples=20)
    assert found["plcc_fitted"] is found["rmse_fitted"] is None and "plcc_fitted" not in found["left_out"]
    assert found["srcc"][1] < 0
    few = intervals([1.0, None, 2.0], [1.0, 2.0, 3.0], resamples=20)
    assert few == {**dict.fromkeys(METRICS), "level": 0.95, "left_out": {}}
    equal = intervals([2.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], resamples=20)
    assert [name for name in METRICS if equal[name]] == ["rmse"]


@pytest.mark.parametrize("metric", ["srcc", "krcc", "rmse"])
def test_a_comparison_is_that_of_a_slow_loop_over_videos_that_both_scored(metric):
    a, mos = sample("close", 40, seed=0)
    b = [s + d for s, d in zip(a, np.random.default_rng(1).normal(0, 0.3, 40))]
    given_a, given_b = [None, *a[1:]], [*b[:-1], None]
    found = paired_bootstrap(given_a, given_b, mos, metric, resamples=100, seed=7)
    draws = [slow_draws(scores[1:-1], mos[1:-1], 100, seed=7) for scores in (a, b)]
    differences = [of_a[metric] - of_b[metric] for of_a, of_b in zip(*draws)]
    on_all = [scipy_metrics(scores[1:-1], mos[1:-1])[metric] for scores in (a, b)]
    below, above = sum(d <= 0 for d in differences), sum(d >= 0 for d in differences)
    assert found["videos"] == 38 and found["left_out"] == 0 and found["undefined"] is None
    assert found["difference"] == pytest.approx(on_all[0] - on_all[1])
    assert found["interval"] == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist())
    assert found["p_value"] == pytest.approx(min(1, 2 * (1 + min(below, above)) / 101))
    json.dumps(found, allow_nan=False)


def test_a_model_does_not_differ_from_itself_and_differs_from_noise():
    a, mos = sample("close", 60)
    noise = sample("random", 60, seed=9)[0]
    same = paired_bootstrap(a, a, mos, resamples=50)
    assert (same["difference"], same["interval"], same["p_value"]) == (0, [0, 0], 1)
    found, turned = paired_bootstrap(a, noise, mos, resamples=99), paired_bootstrap(noise, a, mos, resamples=99)
    assert found["p_value"] == turned["p_value"] == pytest.approx(2 / 100) and found["interval"][0] > 0
    assert turned["difference"] == -found["difference"]


@pytest.mark.parametrize("metric", METRICS[:3])
def test_rounding_is_no_difference(metric):
    a, mos = sample("close", 60)
    found = paired_bootstrap(a, [0.3 * score + 0.7 for score in a], mos, metric, resamples=50)
    assert abs(found["difference"]) < 1e-12 and found["p_value"] == 1


def test_a_comparison_without_a_metric_says_why():
    a, mos = sample("close", 10)
    found = paired_bootstrap([2.0] * 10, a, mos, resamples=10)
    assert found["difference"] is found["interval"] is found["p_value"] is None
    assert found["undefined"] == "a: all scores are equal" and found["videos"] == 10
    apart = paired_bootstrap([*a[:5], *[None] * 5], [*[None] * 5, *a[5:]], mos, resamples=10)
    assert apart["videos"] == 0 and apart["undefined"] == "a: no scored videos; b: no scored videos"
    with pytest.raises(ValueError, match="metric 'auc': choose among srcc"):
        paired_bootstrap(a, a, mos, "auc")


def test_a_mean_is_weighted_by_videos_and_leaves_out_what_is_unknown():
    found = weighted_mean({"a": 0.9, "b": None, "c": 0.3}, {"a": 300, "b": 1000, "c": 100})
    assert found == {"mean": pytest.approx((300 * 0.9 + 100 * 0.3) / 400), "videos": 400, "left_out": ["b"]}
    assert weighted_mean({"b": None}, {"b": 5}) == {"mean": None, "videos": 0, "left_out": ["b"]}
    assert weighted_mean({}, {}) == {"mean": None, "videos": 0, "left_out": []}
