import random

import pytest
import torch

from rewards import TemporalReward

THRESHOLDS = {"ranking": 0.5, "regression": 0.9}


def slow(raw, perturbed, ok, scope, ties_win):
    videos, answers = len(ok), len(next(iter(raw.values()))[0])
    reward = [[0.0] * answers for _ in range(videos)]
    for name in perturbed:
        gains = [sum(raw[name][n]) / answers - sum(perturbed[name][n]) / answers for n in range(videos)]
        if scope == "batch":
            kept = [gain for gain, good in zip(gains, ok) if good]
            gains = [sum(kept) / len(kept) if kept else 0.0] * videos
        for n in range(videos):
            for g in range(answers):
                won = gains[n] > 0 or (ties_win and gains[n] == 0)
                if ok[n] and won and raw[name][n][g] > THRESHOLDS[name]:
                    reward[n][g] += 0.3
    return torch.tensor(reward)


def draw(rng, videos, answers):
    # Multiples of 1/8 have exact means, so that ties are ties in the slow version too.
    return [[rng.randrange(9) / 8 for _ in range(answers)] for _ in range(videos)]


def tensors(terms):
    return {name: torch.tensor(values) for name, values in terms.items()}


@pytest.mark.parametrize("scope", ["video", "batch"])
@pytest.mark.parametrize("ties_win", [False, True])
@pytest.mark.parametrize("names", [("ranking",), ("regression",), ("ranking", "regression")])
def test_equals_the_slow_version(scope, ties_win, names):
    rng = random.Random(0)
    for _ in range(30):
        raw = {name: draw(rng, 6, 2) for name in names}
        perturbed = {name: draw(rng, 6, 2) for name in names}
        ok = [rng.random() < 0.8 for _ in range(6)]
        reward = TemporalReward(scope=scope, ties_win=ties_win)(tensors(raw), tensors(perturbed), torch.tensor(ok))
        torch.testing.assert_close(reward, slow(raw, perturbed, ok, scope, ties_win))


def test_by_default_each_video_is_compared_with_its_own_copy():
    values = torch.tensor([[0.9, 0.6], [0.9, 0.6]])
    raw, perturbed = {"ranking": values.clone()}, {"ranking": torch.tensor([[0.1, 0.1], [1.0, 1.0]])}
    reward = TemporalReward()(raw, perturbed, torch.tensor([True, True]))
    torch.testing.assert_close(reward, torch.tensor([[0.3, 0.3], [0.0, 0.0]]))
    assert torch.equal(raw["ranking"], values)  # the base term stays as it is


@pytest.mark.parametrize(("ties_win", "bonus"), [(False, 0.0), (True, 0.3)])
def test_the_same_answers_in_another_order_are_a_tie(ties_win, bonus):
    values = torch.rand(200, 16, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.6
    orders = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(n)) for n in range(200)])
    shuffled = values.gather(1, orders)
    assert (values.mean(-1) != shuffled.mean(-1)).any()  # so rounding alone would decide
    reward = TemporalReward(ties_win=ties_win)({"ranking": values}, {"ranking": shuffled}, torch.ones(200).bool())
    torch.testing.assert_close(reward, torch.full((200, 16), bonus))


def test_batch_scope_sums_over_ranks():
    raw = {"ranking": torch.tensor([[0.6], [0.8], [0.9], [0.7]])}
    perturbed = {"ranking": torch.tensor([[0.7], [0.9], [0.1], [0.9]])}
    ok = torch.tensor([True, True, True, False])
    reward = TemporalReward(scope="batch")
    whole = reward(raw, perturbed, ok)

    def half(part, sum_over_ranks):
        terms = ({name: values[part] for name, values in group.items()} for group in (raw, perturbed))
        return reward(*terms, ok[part], sum_over_ranks)

    sent = []
    for part in (slice(2), slice(2, 4)):
        half(part, lambda tensor: sent.append(tensor) or tensor)
    halves = [half(part, lambda _: sum(sent)) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.tensor([[0.3], [0.3], [0.3], [0.0]]))
    assert torch.equal(torch.cat(halves), whole)
    assert half(slice(2), lambda tensor: tensor).eq(0).all()  # the first half alone gains nothing


def test_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match="scope"):
        TemporalReward(scope="rank")
