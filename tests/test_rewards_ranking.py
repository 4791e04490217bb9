import math
import random

import pytest
import torch

from rewards import Answers, Opponents, RankingReward


def batch(scores, mos):
    """Answers that hold these scores; None is an unparsed answer."""
    texts = [["?" if score is None else f"<answer>{score:.2f}</answer>" for score in group] for group in scores]
    return Answers.from_texts(texts, torch.tensor(mos))


def mean_variance(group):
    known = [score for score in group if score is not None]
    if not known:
        return None, 0.0
    mean = sum(known) / len(known)
    return mean, sum((score - mean) ** 2 for score in known) / (len(known) - 1) if len(known) > 1 else 0.0


def slow(groups, own, scores, mos, floor, opponents="all"):
    """Rewards of `groups`, which belong to the videos `own` of the step whose raw groups are `scores`."""
    rewards = []
    for i, group in zip(own, groups):
        _, v_i = mean_variance(group)
        rewards.append([])
        for s in group:
            duels = []
            for j, opponent in enumerate(scores):
                mu_j, v_j = mean_variance(opponent)
                if j == i or mu_j is None or s is None:
                    continue
                if opponents == "one" and j != (0 if i == len(scores) - 1 else i + 1):
                    continue
                p = 0.5 * (1 + math.erf((s - mu_j) / math.sqrt(max(v_i + v_j, floor)) / math.sqrt(2)))
                g = 0.5 if mos[i] == mos[j] else float(mos[i] > mos[j])
                duels.append(math.sqrt(p * g + 1e-6) + math.sqrt((1 - p) * (1 - g) + 1e-6))
            rewards[-1].append(sum(duels) / len(duels) if duels else 0.0)
    return torch.tensor(rewards)


def step(videos, answers, seed):
    draw = random.Random(seed)
    scores = [[draw.choice([None, *[round(draw.uniform(1, 5), 2)] * 4]) for _ in range(answers)] for _ in range(videos)]
    scores[-1] = [None] * answers
    mos = [round(draw.uniform(1, 5), 1) for _ in range(videos)]
    mos[1] = mos[0]
    return scores, mos


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("floor", [0.04, 1e-6, 2.0])
@pytest.mark.parametrize("answers", [1, 4])
@pytest.mark.parametrize("met", ["all", "one"])
def test_equals_the_slow_version(seed, floor, answers, met):
    scores, mos = step(5, answers, seed)
    rounding = 1e-5 if met == "all" else 4e-5  # of 1 - p in float32 near 0, in a mean of four or alone
    raw = batch(scores, mos)
    opponents = Opponents.from_answers(raw)
    reward = RankingReward(floor, met)(raw, opponents, torch.arange(5))
    torch.testing.assert_close(reward, slow(scores, range(5), scores, mos, floor, met), rtol=1e-4, atol=rounding)

    perturbed, _ = step(5, answers, seed + 100)
    reward = RankingReward(floor, met)(batch(perturbed, mos), opponents, torch.arange(5))
    torch.testing.assert_close(reward, slow(perturbed, range(5), scores, mos, floor, met), rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("met", ["all", "one"])
def test_two_processes_equal_one(met):
    scores, mos = step(6, 3, seed=0)
    whole = batch(scores, mos)
    opponents = Opponents.from_answers(whole)
    parts = [batch(scores[k : k + 3], mos[k : k + 3]) for k in (0, 3)]
    gathered = Opponents(*(torch.cat(field) for field in zip(*map(Opponents.from_answers, parts))))
    reward = RankingReward(opponents=met)
    rewards = [reward(part, gathered, torch.arange(3) + k) for part, k in zip(parts, (0, 3))]
    assert torch.equal(torch.cat(rewards), reward(whole, opponents, torch.arange(6)))


def test_own_must_name_the_rows_of_the_videos():
    raw = batch([[3.0], [4.0]], [3.0, 4.0])
    with pytest.raises(AssertionError, match="own"):
        RankingReward()(raw, Opponents.from_answers(raw), torch.tensor([1, 0]))


def test_a_tiny_gap_between_unanimous_groups_is_no_certain_win():
    raw = batch([[3.01, 3.01], [3.00, 3.00]], [4.0, 2.0])
    reward = RankingReward()(raw, Opponents.from_answers(raw), torch.arange(2))
    assert ((reward > 0.70) & (reward < 0.75)).all()  # a tie earns sqrt(0.5) = 0.71, a certain win 1.00


@pytest.mark.parametrize("scores", [[[3.0, 4.0]], [[None, None], [3.0, 4.0]]])
def test_no_opponent_gives_zero(scores):
    raw = batch(scores, [3.0] * len(scores))
    reward = RankingReward()(raw, Opponents.from_answers(raw), torch.arange(len(scores)))
    assert reward.eq(0).all()


@pytest.mark.parametrize("scores", [[[1.0, 1.0], [5.0, 5.0]], [[None], [None]], [[1.0], [5.0]]])
def test_extremes_are_finite(scores):
    raw = batch(scores, [5.0, 1.0])
    assert RankingReward(1e-12)(raw, Opponents.from_answers(raw), torch.arange(2)).isfinite().all()


@pytest.mark.parametrize("floor", [0, -1, math.nan])
def test_refuses_a_floor_that_divides_by_zero(floor):
    with pytest.raises(ValueError, match="variance_floor"):
        RankingReward(floor)


def test_refuses_other_opponents():
    with pytest.raises(ValueError, match="opponents"):
        RankingReward(opponents="some")
