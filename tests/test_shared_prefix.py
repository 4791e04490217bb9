import itertools
import json
import math

import pytest
import torch

from models.shared_prefix import GroupCache, packed_attention, packed_positions, token_attention
from tests.benchmarks import attention
from tests.helpers import generator, relative

N, P, G, T, D = 2, 5, 3, 4, 8
HEADS = [(4, 4), (4, 2), (4, 1)]  # query heads, key/value heads


@pytest.mark.parametrize(("P", "G", "T"), [(5, 3, 4), (1, 1, 1), (3, 2, 0), (4, 0, 0), (2, 4, 1)])
def test_positions_equal_the_slow_version(P, G, T):
    tokens = [(g, t) for g in range(G) for t in range(T)]
    assert packed_positions(P, G, T).tolist() == [[*range(P), *(P + t for _, t in tokens)]]


def plain_attention(query, keys, values):
    """softmax(q k / sqrt(D)) v of one query (D,) over a list of keys and values, in float64."""
    weights = [math.exp(query.double() @ key.double() / math.sqrt(D)) for key in keys]
    return sum(weight * value.double() for weight, value in zip(weights, values)) / sum(weights)


def random(*shape, seed):
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize(("H", "K"), HEADS)
def test_packed_attention_equals_every_answer_alone_behind_its_own_prompt(H, K):
    A = G * T
    query, key, value = (random(N, heads, P + A, D, seed=seed) for seed, heads in enumerate((H, K, K)))
    out = packed_attention(query, key, value, G, T, D**-0.5)
    expected = torch.empty(N, P + A, H, D)
    for n, h, place in itertools.product(range(N), range(H), range(P + A)):
        start = P + (place - P) // T * T
        seen = [*range(P), *range(start, place + 1)] if place >= P else range(place + 1)
        k = h // (H // K)
        expected[n, place, h] = plain_attention(query[n, h, place], key[n, k, seen], value[n, k, seen])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    alone = packed_attention(*(x[:, :, :P] for x in (query, key, value)), 0, 0, D**-0.5)
    torch.testing.assert_close(alone, expected[:, :P], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("H", "K"), HEADS)
def test_the_slower_ways_compute_the_same(H, K):
    leaves = [random(N, heads, P + G * T, D, seed=seed).requires_grad_() for seed, heads in enumerate((H, K, K))]
    outs = {name: way(*leaves, G, T) for name, way in attention.WAYS.items()}
    gradients = {name: torch.autograd.grad(out.square().sum(), leaves) for name, out in outs.items()}
    for name in attention.WAYS:
        torch.testing.assert_close(outs[name], outs["per answer"], rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients[name], gradients["per answer"]):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_benchmark_of_the_ways_prints_their_times(capsys):
    attention.main(["--group", "2", "--prompt", "5", "--new-tokens", "3", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out)["ways"]
    assert found.keys() == attention.WAYS.keys() and all(ms > 0 for way in found.values() for ms in way.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("H", "K"), HEADS)
def test_packed_attention_is_the_same_on_a_gpu(H, K):
    A, D = G * 33, 64
    inputs = [torch.randn(N, heads, P + A, D, generator=generator(k)) for k, heads in enumerate((H, K, K))]
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        leaves = [x.bfloat16().to(device, dtype).requires_grad_() for x in inputs]
        out = packed_attention(*leaves, G, 33, D**-0.5)
        found.append([x.cpu().double() for x in (out, *torch.autograd.grad(out.square().sum(), leaves))])
    for ours, exact in zip(found[1], found[0]):
        assert relative(ours, exact) < 0.02


@pytest.mark.parametrize(("H", "K"), HEADS)
def test_token_attention_equals_every_answer_alone_behind_its_own_prompt(H, K):
    query = random(N, H, G, D, seed=0)
    prompt_key, prompt_value = (random(N, K, P, D, seed=seed) for seed in (1, 2))
    own_key, own_value = (random(N, K, G, T, D, seed=seed) for seed in (3, 4))
    unwritten = torch.tensor([0.0] * (T - 1) + [-torch.inf])
    out = token_attention(query, (prompt_key, prompt_value), (own_key, own_value), unwritten, D**-0.5)
    expected = torch.empty(N, G, H, D)
    for n, h, g in itertools.product(range(N), range(H), range(G)):
        k = h // (H // K)
        keys = [*prompt_key[n, k], *own_key[n, k, g, :-1]]
        values = [*prompt_value[n, k], *own_value[n, k, g, :-1]]
        expected[n, g, h] = plain_attention(query[n, h, g], keys, values)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("same_shapes", [False, True])
def test_cache_takes_a_token_a_step_and_forgets_answers_only(same_shapes):
    cache = GroupCache()
    cache.store_prompt(0, *random(2, N, 2, P, D, seed=0))
    for round_ in range(2):
        cache.begin_answers(T, same_shapes)
        steps = random(T, 2, N, 2, G, D, seed=round_)
        for t, (key, value) in enumerate(steps):
            cache.next_slot()
            found = cache.append(0, key, value)
            seen, unwritten = T if same_shapes else t + 1, cache.unwritten[: cache.seen]
            assert torch.equal(unwritten, torch.tensor([0.0] * (t + 1) + [-torch.inf] * (seen - t - 1)))
            for slots, written in zip(found, steps[: t + 1].unbind(1)):
                assert torch.equal(slots[:, :, :, : t + 1], written.movedim(0, 3))
                assert slots.shape[3] == seen and not slots[:, :, :, t + 1 :].any()  # NaN would be
        kept, (videos, slots) = cache.answers[0], (torch.tensor([1]), torch.tensor([[2, 0]]))
        cache.keep(videos, slots)
        for before, after, prompt, all_prompts in zip(kept, cache.answers[0], cache.prompt_read[0], cache.prompt[0]):
            assert torch.equal(after, torch.stack([before[1:, :, 2], before[1:, :, 0]], dim=2))
            assert torch.equal(prompt, all_prompts[1:])
    assert torch.equal(cache.prompt[0][0], random(2, N, 2, P, D, seed=0)[0])
