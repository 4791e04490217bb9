import itertools
import math

import pytest
import torch

from grpo.loss import grpo_loss, kl_estimate, token_weights
from tests.helpers import generator, ragged_mask

MEANS = ("sequence", "token", "constant")
ESTIMATORS = ("k1", "k2", "k3")
N, G, T, MAX_TOKENS = 2, 3, 5, 7
CLIP = {"clip_low": 0.1, "clip_high": 0.3}


def example(seed=0):
    """Log-probs, old ones, reference, advantages and mask; ratios reach from about 0.5 to 2, on both signs."""
    logprobs, old, reference = -3 + 0.35 * torch.randn(3, N, G, T, generator=generator(seed), dtype=torch.float64)
    advantages = torch.randn(N, G, generator=generator(seed + 1), dtype=torch.float64)
    return logprobs, old, reference, advantages, ragged_mask(N, G, T, seed)


def weights_of(mask, mean):
    return token_weights(mask, mean, N * G, int(mask.sum()), MAX_TOKENS).double()


def slow_divergence(logprob, reference, kl):
    log_ratio = reference - logprob
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(log_ratio) - 1 - log_ratio}[kl]


def slow_loss(logprobs, old, reference, advantages, mask, mean, beta, kl):
    """Minus the mean objective and the sums, token by token."""
    answers, sums = [], dict.fromkeys(("ratio", "clipped_low", "clipped_high", "kl"), 0.0)
    for n, g in itertools.product(range(N), range(G)):
        A = advantages[n, g].item()
        terms = []
        for t in range(T):
            if not mask[n, g, t]:
                continue
            ratio = math.exp(logprobs[n, g, t] - old[n, g, t])
            clipped = min(max(ratio, 0.9), 1.3)
            divergence = slow_divergence(logprobs[n, g, t].item(), reference[n, g, t].item(), kl)
            terms.append(min(ratio * A, clipped * A) - beta * divergence)
            sums["ratio"] += ratio
            sums["clipped_low"] += ratio < 0.9 and A < 0
            sums["clipped_high"] += ratio > 1.3 and A > 0
            sums["kl"] += divergence
        answers.append(terms)
    objective = {
        "sequence": sum(sum(terms) / len(terms) for terms in answers) / len(answers),
        "token": sum(map(sum, answers)) / sum(map(len, answers)),
        "constant": sum(map(sum, answers)) / (len(answers) * MAX_TOKENS),
    }
    return -objective[mean], sums


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("kl", ESTIMATORS)
def test_equals_the_slow_version(kl, mean, seed):
    logprobs, old, reference, advantages, mask = example(seed)
    loss, sums = grpo_loss(logprobs, old, reference, advantages, mask, weights_of(mask, mean), **CLIP, beta=0.3, kl=kl)
    expected, expected_sums = slow_loss(logprobs, old, reference, advantages, mask, mean, 0.3, kl)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected_sums, rel=1e-6)


def test_the_examples_clip_on_both_sides():
    clipped = [slow_loss(*example(seed), "token", 0.0, "k3")[1] for seed in range(3)]
    assert all(sum(sums[side] for sums in clipped) >= 3 for side in ("clipped_low", "clipped_high"))


def test_without_a_reference_there_is_no_kl():
    logprobs, old, _, advantages, mask = example()
    loss, sums = grpo_loss(logprobs, old, None, advantages, mask, weights_of(mask, "token"), **CLIP, beta=0.3, kl="k3")
    expected, _ = slow_loss(logprobs, old, logprobs, advantages, mask, "token", 0.3, "k3")
    assert loss.item() == pytest.approx(expected, rel=1e-6) and sums["kl"] == 0


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("kl", ESTIMATORS)
def test_gradient_on_three_tokens(kl, advantage):
    """A token inside the clip range, one above, one below: the objective's slope is A r, or 0 where the clip holds."""
    ratio = torch.tensor([1.05, 1.5, 0.5], dtype=torch.float64)
    reference = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64)
    logprobs = torch.tensor([-1.2, -0.7, -1.5], dtype=torch.float64, requires_grad=True)
    weights, beta = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), 0.1

    loss, _ = grpo_loss(
        logprobs[None, None],
        (logprobs.detach() - ratio.log())[None, None],
        reference[None, None],
        torch.tensor([[advantage]], dtype=torch.float64),
        torch.ones(1, 1, 3, dtype=torch.bool),
        weights[None, None],
        **CLIP,
        beta=beta,
        kl=kl,
    )
    loss.backward()

    held = torch.tensor([False, advantage > 0, advantage < 0])
    gap = logprobs.detach() - reference
    slope = {"k1": torch.ones_like(gap), "k2": gap, "k3": 1 - (-gap).exp()}[kl]
    expected = -weights * (torch.where(held, 0, advantage * ratio) - beta * slope)
    torch.testing.assert_close(logprobs.grad, expected)


@pytest.mark.parametrize("kl", ESTIMATORS)
@pytest.mark.parametrize("jump", [1e4, -1e4, math.inf, -math.inf])
def test_what_stands_at_masked_positions_does_not_matter(jump, kl):
    *given, advantages, mask = example()

    def outcome(logprobs, old, reference):
        variable = logprobs.clone().requires_grad_()
        loss, sums = grpo_loss(
            variable, old, reference, advantages, mask, weights_of(mask, "sequence"), **CLIP, beta=0.3, kl=kl
        )
        loss.backward()
        return [loss.detach(), variable.grad, *sums.values()]

    expected = outcome(*given)
    assert all(value.isfinite().all() for value in expected) and expected[1][~mask].eq(0).all()
    for k in range(3):
        changed = [x.where(mask, jump) if k == place else x for place, x in enumerate(given)]
        assert all(torch.equal(value, wanted) for value, wanted in zip(outcome(*changed), expected))


@pytest.mark.parametrize("mean", MEANS)
def test_token_weights_equal_the_slow_version(mean):
    mask = ragged_mask(N, G, T, seed=3)
    mask[0, 0] = False  # an answer without a token weighs nothing and divides nothing by 0
    tokens = sum(mask.flatten().tolist()) + 20  # of the whole step, of which this is a micro-batch
    expected = torch.zeros(N, G, T)
    for n, g, t in itertools.product(range(N), range(G), range(T)):
        if mask[n, g, t]:
            length = sum(mask[n, g].tolist())
            expected[n, g, t] = {
                "sequence": 1 / (10 * length),
                "token": 1 / tokens,
                "constant": 1 / (10 * MAX_TOKENS),
            }[mean]
    torch.testing.assert_close(token_weights(mask, mean, 10, tokens, MAX_TOKENS), expected)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--loss-mean median"):
        token_weights(torch.ones(1, 1, 1, dtype=torch.bool), "median", 1, 1, 1)
    with pytest.raises(ValueError, match="--kl k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_estimators_against_the_exact_kl():
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist()))
    k1, k2, k3 = (kl_estimate(policy.log(), reference.log(), name) for name in ESTIMATORS)
    mean = {name: (policy * k).sum().item() for name, k in zip(ESTIMATORS, (k1, k2, k3))}
    assert mean["k1"] == pytest.approx(exact) and mean["k3"] == pytest.approx(exact)
    assert mean["k2"] != pytest.approx(exact, rel=0.01)
    assert k1.min() < 0 < k2.min() and k3.min() > 0
    assert kl_estimate(policy.log(), policy.log(), "k3").eq(0).all()


def test_expected_gradients_of_the_estimators():
    """On the policy's own tokens: k1 none, k2 that of KL(policy || reference), k3 that of KL(reference || policy)."""
    logits = torch.tensor([1.0, 0.3, -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    def expected(name):
        logprobs = logits.log_softmax(-1)
        return gradient((logprobs.detach().exp() * kl_estimate(logprobs, reference.log(), name)).sum())

    policy = logits.softmax(-1)
    torch.testing.assert_close(expected("k1"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expected("k2"), gradient((policy * (policy / reference).log()).sum()))
    policy = logits.softmax(-1)
    torch.testing.assert_close(expected("k3"), gradient((reference * (reference / policy).log()).sum()))
