import pytest

from grpo.health import SIGNS, Health

FINE = {
    "kl": 0.05,
    "entropy": 0.2,
    "score_std": 0.6,
    "truncated": 0.01,
    "zero_variance": 0.1,
    "skipped": 0,
    "reward": {"mean": 2.0},
    "val": None,
}


def series(steps, **numbers):
    """Rows of so many steps, fine but for the given numbers: a value, or a function of the step."""
    return [
        {"step": step} | FINE | {name: given(step) if callable(given) else given for name, given in numbers.items()}
        for step in range(1, steps + 1)
    ]


def told(rows):
    """The step and the line of each warning."""
    health = Health()
    return [(row["step"], line) for row in rows for line in health.add(row)]


def found(rows):
    """The signs that were found, by the steps that show them."""
    return {name: found["steps"] for name, found in Health(rows).found.items() if found["steps"]}


def from_step(first, bad, name):
    return lambda step: bad if step >= first else FINE[name]


def test_a_run_without_trouble_is_not_disturbed():
    assert told(series(300)) == []
    assert Health().found.keys() == SIGNS.keys()
    assert all(found == {"steps": 0, "first": None, "number": None} for found in Health(series(300)).found.values())


# Name of the sign, metric, a value that is trouble, one that is just not, and from when on it is told if the trouble
# begins at step 60: more than half of the steps of a level have to be bad.
LEVELS = [
    ("kl_jump", "kl", 0.51, 0.5, 62),
    ("entropy_collapse", "entropy", 0.019, 0.021, 65),
    ("score_collapse", "score_std", 0.049, 0.051, 65),
    ("truncated", "truncated", 0.21, 0.2, 65),
    ("zero_variance", "zero_variance", 0.51, 0.5, 65),
    ("skipped", "skipped", 1, 0, 60),
]


@pytest.mark.parametrize(("sign", "name", "bad", "fine", "first"), LEVELS)
def test_a_level_beyond_its_limit_is_told_once_and_counted(sign, name, bad, fine, first):
    rows = series(80, **{name: from_step(60, bad, name)})
    ((step, line),) = told(rows)
    assert step == first
    assert line.startswith(f"step {step}: ") and line.endswith(f" ({sign})")
    health = Health(rows)
    assert health.found[sign]["first"] == step and health.found[sign]["steps"] == 80 - step + 1
    assert told(series(80, **{name: from_step(60, fine, name)})) == []


@pytest.mark.parametrize(("sign", "name", "bad", "fine", "first"), LEVELS[:-1])
def test_single_odd_steps_are_not_trouble(sign, name, bad, fine, first):
    assert told(series(200, **{name: lambda step: bad if step % 3 == 0 else FINE[name]})) == []


def test_a_level_takes_half_of_its_steps_to_be_known():
    assert [step for step, _ in told(series(20, truncated=1.0))] == [5]
    assert [step for step, _ in told(series(20, kl=3.0))] == [3]


def test_the_number_is_that_of_the_step():
    health = Health(series(70, score_std=from_step(60, 0.01, "score_std")))
    assert health.found["score_collapse"]["number"] == 0.01
    (line,) = Health(series(20)).add({**series(21)[-1], "skipped": 3})
    assert line == "step 21: 3 updates left out: loss or gradient not finite (skipped)"


def test_a_kl_that_begins_at_nothing_may_grow_by_any_factor_but_not_to_anything():
    assert told(series(100, kl=lambda step: min(0.4, 1e-6 * 2**step))) == []
    ((step, _),) = told(series(20, kl=lambda step: 1e-6 * 3**step))
    assert 1e-6 * 3**step > 0.5 and step < 20


def test_a_kl_that_has_grown_slowly_is_no_jump():
    assert told(series(300, kl=lambda step: 0.01 * step)) == []


def test_metrics_may_be_missing():
    gaps = {name: lambda step: None if step % 2 else FINE["kl"] for name in ("kl", "entropy", "score_std")}
    assert told(series(100, **gaps)) == []
    assert told(series(100, kl=None, entropy=None, score_std=None)) == []


def test_without_a_reference_the_kl_is_zero_and_says_nothing():
    assert told(series(100, kl=0.0)) == []


def validations(*srcc, reward):
    """A validation every ten steps; `reward` of the k-th of these stretches, from 0."""
    return series(
        10 * len(srcc),
        val=lambda step: {"srcc": srcc[step // 10 - 1]} if step % 10 == 0 else None,
        reward=lambda step: {"mean": reward((step - 1) // 10)},
    )


def test_a_validation_that_falls_while_the_reward_rises_is_told():
    rows = validations(0.5, 0.8, 0.745, 0.7, 0.6, 0.5, reward=lambda k: 2 + 0.1 * k)
    ((step, line),) = told(rows)
    assert step == 40 and "validation SRCC is 0.055 below its best" in line
    assert found(rows) == {"srcc_falls": 3}


@pytest.mark.parametrize(
    ("srcc", "reward"),
    [
        ((0.5, 0.8, 0.7, 0.8, 0.7, 0.79), lambda k: 2 + 0.1 * k),  # not twice in a row
        ((0.5, 0.8, 0.76, 0.76, 0.76, 0.76), lambda k: 2 + 0.1 * k),  # not by enough
        ((0.5, 0.8, 0.7, 0.6, 0.5, 0.4), lambda k: 2 - 0.1 * k),  # the reward falls too
        ((0.5, None, None, 0.6, None, 0.7), lambda k: 2 + 0.1 * k),
        ((-0.2,), lambda k: 2),
    ],
)
def test_a_validation_is_left_alone(srcc, reward):
    assert found(validations(*srcc, reward=reward)) == {}


@pytest.mark.parametrize("stop", [1, 12, 61, 63, 70])
def test_a_resumed_run_tells_what_the_whole_one_would_and_nothing_twice(stop):
    rows = series(80, kl=from_step(60, 2.0, "kl"), entropy=from_step(64, 0.01, "entropy"))
    health = Health(rows[:stop])
    lines = [(row["step"], line) for row in rows[stop:] for line in health.add(row)]
    assert lines == [(step, line) for step, line in told(rows) if step > stop]
    assert health.found == Health(rows).found
