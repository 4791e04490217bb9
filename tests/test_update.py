import itertools
import json
from dataclasses import replace

import pytest
import torch

from grpo.config import Config
from grpo.master_weights import MasterAdamW
from grpo.runlog import Phases
from grpo.update import Batch, freeze, token_logprobs, update
from models.loading import load_policy, save_policy
from tests.helpers import generator, gradients, parameters, relative, rollouts, sgd, tiny_policy

N, G, T = 8, 3, 5
RATE = 0.004
BASE = Config(videos_per_step=N, group_size=G, max_new_tokens=T + 2, micro_batch=N, beta=0.1, grad_clip=1e9)


def neighbour(policy):
    """A reference: the policy's weights, each a little off."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator(1))
    return policy.requires_grad_(False)


def one_update(config, reference=None):
    """A policy that made one update with this config, the batch, and the metrics."""
    policy = tiny_policy()
    batch = freeze(*rollouts(policy, N, G, T), policy, reference, config)
    return policy, batch, update(policy, sgd(policy), batch, RATE, config, Phases())


def slow_update(config, reference):
    """The same from the definition: answer by answer, means instead of weights, gradient steps by hand."""
    policy = tiny_policy()
    videos, groups, advantages = rollouts(policy, N, G, T)
    lengths = groups.mask.sum(-1)
    share = {
        "sequence": lambda pair: 1 / (N * G * lengths[pair]),
        "token": lambda pair: 1 / lengths.sum(),
        "constant": lambda pair: 1 / (N * G * config.max_new_tokens),
    }[config.loss_mean]

    def logprobs(network, pair):
        (n, g), length = pair, lengths[pair]
        return network(videos[n : n + 1], groups.ids[n : n + 1, g : g + 1, :length]).logprobs[0, 0]

    pairs = list(itertools.product(range(N), range(G)))
    with torch.no_grad():
        old, ref = ([logprobs(network, pair) for pair in pairs] for network in (policy, reference))
    for _ in range(config.inner_epochs):
        policy.zero_grad()
        loss, clipped_low, clipped_high, kl = 0, 0, 0, 0
        for pair, before, anchor in zip(pairs, old, ref):
            now, A = logprobs(policy, pair), advantages[pair]
            ratio = (now - before).exp()
            clipped = ratio.clip(1 - config.clip_low, 1 + config.clip_high)
            divergence = (anchor - now).exp() - (anchor - now) - 1
            loss = loss - share(pair) * (torch.min(ratio * A, clipped * A) - config.beta * divergence).sum()
            clipped_low += ((ratio < 1 - config.clip_low) & (A < 0)).sum().item() / lengths.sum().item()
            clipped_high += ((ratio > 1 + config.clip_high) & (A > 0)).sum().item() / lengths.sum().item()
            kl += divergence.sum().item() / lengths.sum().item()
        loss.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= RATE * parameter.grad
    return policy, {"loss": loss.item(), "clipped_low": clipped_low, "clipped_high": clipped_high, "kl": kl}


@pytest.mark.parametrize("loss_mean", ["sequence", "token", "constant"])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_equals_the_slow_version_in_micro_batches_of_any_size(loss_mean, inner_epochs):
    config = replace(BASE, loss_mean=loss_mean, inner_epochs=inner_epochs, clip_low=0.03, clip_high=0.05)
    reference = neighbour(tiny_policy())
    expected, expected_metrics = slow_update(config, reference)
    if inner_epochs == 2:  # the second pass has moved away from the stored log-probs, and clips
        assert min(expected_metrics["clipped_low"], expected_metrics["clipped_high"]) > 0.05
    for size in (8, 4, 3, 1):
        policy, _, metrics = one_update(replace(config, micro_batch=size), reference)
        assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-4)
        for measure in (gradients, parameters):
            for name, value in measure(expected).items():
                assert relative(measure(policy)[name], value) < 1e-5, (size, measure, name)


@pytest.mark.parametrize("size", [8, 3, 1])
def test_a_reference_with_the_same_weights_is_at_no_distance_at_all(size, tmp_path):
    save_policy(tiny_policy(), tmp_path)
    policy, reference = load_policy(str(tmp_path)), load_policy(str(tmp_path))
    sizes = {policy: [], reference: []}
    for network, seen in sizes.items():
        network.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[1].shape))
    config = replace(BASE, micro_batch=size, beta=0.04)
    batch = freeze(*rollouts(policy, N, G, T), policy, reference, config)
    metrics = update(policy, sgd(policy), batch, RATE, config, Phases())
    assert metrics["kl"] == 0.0 and metrics["ratio"] == 1.0
    assert metrics["clipped_low"] == metrics["clipped_high"] == 0.0
    assert sizes[policy] == sizes[reference]  # other shapes may take other kernels, which round otherwise


def test_old_log_probs_are_stored_for_a_second_epoch_only():
    policy = tiny_policy()
    made = rollouts(policy, N, G, T)
    assert freeze(*made, policy, None, BASE).old_logprobs is None
    old = freeze(*made, policy, None, replace(BASE, inner_epochs=2)).old_logprobs
    longest = made[1].mask.sum(-1).max()
    assert torch.equal(old[..., :longest], policy(made[0], made[1].ids[..., :longest]).logprobs)
    assert not old.requires_grad and not old[..., longest:].any()


def test_without_beta_there_is_no_reference():
    policy, batch, metrics = one_update(replace(BASE, beta=0.0))
    assert batch.reference_logprobs is None and metrics["kl"] == 0.0 and metrics["skipped"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), tiny_policy().parameters()))


def adamw(policy):
    return torch.optim.AdamW(policy.parameters(), weight_decay=0.0)


def test_equal_rewards_teach_nothing():
    policy = tiny_policy()
    videos, groups, advantages = rollouts(policy, N, G, T)
    batch = freeze(videos, groups, torch.zeros_like(advantages), policy, None, BASE)
    update(policy, adamw(policy), batch, RATE, BASE, Phases())
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), tiny_policy().parameters()))


@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_a_gradient_that_is_not_finite_changes_no_weight(inner_epochs):
    policy = tiny_policy()
    next(policy.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    config = replace(BASE, inner_epochs=inner_epochs)
    batch = freeze(*rollouts(policy, N, G, T), policy, None, config)
    metrics = update(policy, adamw(policy), batch, RATE, config, Phases())
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), tiny_policy().parameters()))
    assert metrics["skipped"] == inner_epochs and metrics["grad_norm"] is None


def test_a_loss_that_is_not_finite_changes_no_weight_though_its_gradient_is():
    policy = tiny_policy()
    config = replace(BASE, kl="k1")  # whose gradient does not depend on the reference
    batch = freeze(*rollouts(policy, N, G, T), policy, policy, config)
    batch = replace(batch, reference_logprobs=batch.reference_logprobs - torch.inf)
    metrics = update(policy, adamw(policy), batch, RATE, config, Phases())
    assert metrics["skipped"] == 1 and metrics["loss"] is None
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), tiny_policy().parameters()))


def test_metrics_of_an_infinite_loss_can_be_written_down():
    policy = tiny_policy()
    batch = freeze(*rollouts(policy, N, G, T), policy, policy, BASE)
    batch = replace(batch, reference_logprobs=batch.reference_logprobs + 100)  # more than exp can take
    metrics = update(policy, adamw(policy), batch, RATE, BASE, Phases())
    assert metrics["skipped"] == 1
    json.dumps(metrics, allow_nan=False)


def test_the_gradient_is_clipped_to_its_largest_norm():
    free, _, metrics = one_update(BASE)
    norm = sum(gradient.square().sum() for gradient in gradients(free).values()).sqrt()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    clipped, _, metrics = one_update(replace(BASE, grad_clip=norm.item() / 4))
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)  # before it was clipped
    for name, gradient in gradients(free).items():
        torch.testing.assert_close(gradients(clipped)[name], gradient / 4)


def test_metrics_are_means_over_the_tokens_that_count():
    policy = tiny_policy()
    videos, groups, advantages = rollouts(policy, N, G, T)
    batch = freeze(videos, groups, advantages, policy, None, BASE)
    entropy = policy(videos, groups.ids).entropy
    counted = [entropy[place].item() for place in itertools.product(range(N), range(G), range(T)) if groups.mask[place]]
    phases = Phases()
    metrics = update(policy, sgd(policy), batch, RATE, replace(BASE, micro_batch=3), phases)
    assert metrics["tokens"] == len(counted)
    assert metrics["entropy"] == pytest.approx(sum(counted) / len(counted), rel=1e-5)
    assert set(phases.take()) == {"forward", "backward", "optimizer"}


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_micro_batches_hold_every_video_once(size):
    policy = tiny_policy()
    batch = freeze(*rollouts(policy, N, G, T), policy, policy, replace(BASE, inner_epochs=2))
    parts = batch.split(size)
    assert [len(part.ids) for part in parts] == [min(size, N - start) for start in range(0, N, size)]
    assert {part.tokens for part in parts} == {batch.tokens}
    longest = [max(row) for row in batch.mask.sum(-1).tolist()]
    for k, part in enumerate(parts):  # the longest answer of each is whole, and nothing is behind it
        rows, T_ = slice(k * size, (k + 1) * size), max(longest[k * size : (k + 1) * size])
        for name in ("ids", "mask", "weights", "old_logprobs", "reference_logprobs"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[rows, :, :T_])
        assert torch.equal(part.advantages, batch.advantages[rows])
    assert size != 1 or min(part.ids.shape[-1] for part in parts) < T
    assert torch.equal(torch.cat([part.videos.frames for part in parts]), batch.videos.frames)
    assert isinstance(parts[0], Batch)
    found, counts = token_logprobs(policy, batch, size), batch.mask
    assert found.shape == counts.shape
    torch.testing.assert_close(found[counts], batch.old_logprobs[counts], rtol=1e-5, atol=1e-5)


def test_at_the_released_rate_float32_parameters_move_though_computed_with_in_bfloat16(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    policy = load_policy(str(tmp_path), precision="mixed")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    before = parameters(policy)
    optimizer = MasterAdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    videos, groups, advantages = rollouts(policy, 2, 3, 5)
    batch = freeze(videos, groups, advantages, policy, None, replace(BASE, beta=0.0))
    assert policy(batch.videos, batch.ids).logprobs.dtype == torch.float32
    update(policy, optimizer, batch, 1e-6, replace(BASE, beta=0.0), Phases())
    moved = {name for name, value in parameters(policy).items() if not torch.equal(value, before[name])}
    used = {name for name, parameter in policy.named_parameters() if parameter.grad.any()}
    assert used and used == moved


def test_at_the_released_rate_bfloat16_parameters_move_with_their_masters_and_not_without(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    moved = {}
    for kind in (MasterAdamW, torch.optim.AdamW):
        policy, reference = (load_policy(str(tmp_path), precision="bfloat16") for _ in range(2))
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
        before, optimizer = parameters(policy), kind(policy.parameters(), lr=1e-6, weight_decay=0.0)
        videos, groups, advantages = rollouts(policy, 2, 3, 5)
        batch = freeze(videos, groups, advantages, policy, reference, BASE)
        assert policy(batch.videos, batch.ids).logprobs.dtype == torch.float32
        metrics = [update(policy, optimizer, batch, 1e-6, BASE, Phases()) for _ in range(60)]
        assert metrics[0]["kl"] == 0.0 and metrics[0]["ratio"] == 1.0 and all(row["skipped"] == 0 for row in metrics)
        changed = [(value != before[name]) & (before[name].abs() > 0.01) for name, value in parameters(policy).items()]
        moved[kind] = sum(int(change.sum()) for change in changed)
    assert moved[torch.optim.AdamW] == 0 and moved[MasterAdamW] > 1000
