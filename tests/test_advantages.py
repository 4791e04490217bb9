import doctest
import math
import random

import pytest
import torch

from grpo import advantages
from grpo.advantages import group_advantages, zero_variance


def test_doctests():
    result = doctest.testmod(advantages, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def slow(rewards, divide_by_std):
    rows = []
    for group in rewards:
        mean = sum(group) / len(group)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
        scale = std + 1e-4 if divide_by_std else 1.0
        rows.append([(reward - mean) / scale for reward in group])
    return torch.tensor(rows)


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("G", [2, 3, 8])
def test_equals_the_slow_version(G, divide_by_std):
    draw = random.Random(G)
    rewards = [[draw.uniform(0, 3.6) for _ in range(G)] for _ in range(5)]
    rewards.append([1.0] * (G - 1) + [1.0001])  # a spread as small as the floor under the standard deviation
    result = group_advantages(torch.tensor(rewards, dtype=torch.float64), divide_by_std)
    torch.testing.assert_close(result, slow(rewards, divide_by_std).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_equal_rewards_give_exactly_zero_though_their_mean_rounds(divide_by_std):
    rewards = torch.tensor([0.1, 0.7, 1.3])[:, None].expand(3, 7)
    assert (rewards - rewards.mean(1, keepdim=True)).any()
    assert group_advantages(rewards, divide_by_std).eq(0).all()
    assert zero_variance(rewards).all()


def test_one_differing_answer_is_no_zero_variance():
    rewards = torch.full((2, 7), 0.1)
    rewards[1, 6] = 0.1 + 1e-6
    assert zero_variance(rewards).tolist() == [True, False]
    assert group_advantages(rewards)[1].ne(0).any()


def test_groups_do_not_see_each_other():
    rewards = torch.rand(4, 5)
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    assert torch.equal(group_advantages(rewards), alone)


def test_rewards_are_not_changed():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]])
    before = rewards.clone()
    group_advantages(rewards)
    assert torch.equal(rewards, before)
