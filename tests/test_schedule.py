import math

import pytest

from grpo.config import Config
from grpo.schedule import learning_rate


def rates(**settings):
    config = Config(lr=0.8, **settings)
    return [learning_rate(step, config) for step in range(config.steps)]


def test_warm_up_is_linear_and_never_zero():
    assert rates(steps=6, warmup_steps=4, schedule="constant") == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert rates(steps=5, warmup_steps=0, schedule=schedule)[0] == 0.8


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_cosine_falls_from_the_peak_to_zero_after_the_last_step(warmup_steps):
    steps = 20
    after = rates(steps=steps, warmup_steps=warmup_steps, schedule="cosine")[warmup_steps:]
    length = steps - warmup_steps
    # cos^2 of half the angle, an independent form of (1 + cos) / 2
    assert after == pytest.approx([0.8 * math.cos(math.pi * k / length / 2) ** 2 for k in range(length)])
    assert learning_rate(steps, Config(steps=steps, warmup_steps=warmup_steps, schedule="cosine")) == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [3, 10])
def test_a_warm_up_as_long_as_the_run_is_all_there_is(schedule, warmup_steps):
    expected = [0.8 * (step + 1) / warmup_steps for step in range(3)]
    assert rates(steps=3, warmup_steps=warmup_steps, schedule=schedule) == pytest.approx(expected)
