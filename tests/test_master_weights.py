"""Float32 masters against AdamW itself and against a scalar AdamW in double precision."""

import copy
import io

import pytest
import torch

from grpo.master_weights import MasterAdamW

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def weights(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))]


def give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(optimizer, parameters, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
        give_gradients(parameters, step)
        optimizer.step()


def adamw(start, gradients, lr, betas, eps, weight_decay):
    """AdamW of one number, by its definition (Loshchilov and Hutter, arXiv 1711.05101)."""
    value, mean, square = start, 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        unbiased, spread = mean / (1 - betas[0] ** t), (square / (1 - betas[1] ** t)) ** 0.5
        value -= lr * weight_decay * value + lr * unbiased / (spread + eps)
    return value


def test_float32_parameters_have_no_masters_and_move_as_under_adamw():
    ours, plain = weights(torch.float32), weights(torch.float32)
    masters, library = MasterAdamW(ours, **OPTIONS), torch.optim.AdamW(plain, **OPTIONS)
    assert masters.pairs() == [] and masters.state_dict()["masters"] == []
    steps(masters, ours, 0, 5)
    steps(library, plain, 0, 5)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain))


def test_bfloat16_parameters_are_their_rounded_masters():
    parameters = weights(torch.bfloat16)
    optimizer = MasterAdamW(parameters, **OPTIONS)
    seen = []
    for step in range(20):
        optimizer.zero_grad()
        give_gradients(parameters, step)
        seen.append([parameter.grad.double() for parameter in parameters])
        optimizer.step()
    for k, (parameter, master) in enumerate(optimizer.pairs()):
        assert master.dtype == torch.float32 and parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, master.bfloat16())
        for place, start in enumerate(weights(torch.bfloat16)[k].flatten().tolist()):
            expected = adamw(start, [gradients[k].flatten()[place].item() for gradients in seen], **OPTIONS)
            assert master.flatten()[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_small_steps_add_up_to_one_that_bfloat16_can_take():
    """Neighbours of 0.02 are 6e-5 away: half of that takes about 30 steps of 1e-6, and AdamW alone never gets there."""
    moves = {}
    for kind in (MasterAdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.tensor([0.02], dtype=torch.bfloat16))
        optimizer, start, moves[kind] = kind([weight], lr=1e-6, weight_decay=0.0), weight.item(), []
        for step in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            if weight.item() < start:
                moves[kind].append(step)
    assert moves[torch.optim.AdamW] == [] and 10 < moves[MasterAdamW][0] < 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_bit_for_bit(dtype):
    uninterrupted, stopped = weights(dtype), weights(dtype)
    through, before = MasterAdamW(uninterrupted, **OPTIONS), MasterAdamW(stopped, **OPTIONS)
    steps(through, uninterrupted, 0, 7)
    steps(before, stopped, 0, 3)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in stopped]
    after = MasterAdamW(resumed, **OPTIONS)
    after.load_state_dict(torch.load(file, weights_only=True))
    steps(after, resumed, 3, 7)
    assert all(torch.equal(one, other) for one, other in zip(uninterrupted, resumed))
    masters = [[master for _, master in optimizer.pairs()] for optimizer in (through, after)]
    assert all(torch.equal(one, other) for one, other in zip(*masters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_goes_on_with_another_weight_decay_has_it(dtype):
    parameters = weights(dtype)
    before = MasterAdamW(parameters, **OPTIONS)
    steps(before, parameters, 0, 3)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    after = MasterAdamW(resumed, **{**OPTIONS, "weight_decay": 0.75})
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    start, moved = [[x.detach().clone() for x in optimizer.masters()] for optimizer in (before, after)]
    assert all(map(torch.equal, start, moved))
    steps(before, parameters, 3, 4)
    steps(after, resumed, 3, 4)
    for x, one, other in zip(start, before.masters(), after.masters()):
        assert torch.allclose(other - one, -OPTIONS["lr"] * (0.75 - 0.1) * x, rtol=1e-3, atol=1e-6)


def test_parameters_of_two_dtypes_and_one_without_a_gradient():
    parameters = [*weights(torch.float32), *weights(torch.bfloat16, seed=1)]
    optimizer = MasterAdamW(parameters, **OPTIONS)
    assert [parameter.dtype for parameter, _ in optimizer.pairs()] == [torch.bfloat16] * 2
    give_gradients(parameters, 0)
    parameters[-1].grad = None
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip(parameters, before)] == [False, False, False, True]
    give_gradients(parameters, 1)
    optimizer.zero_grad()  # of a step that is skipped
    assert all(parameter.grad is None for parameter in parameters)


def test_a_state_of_another_precision_is_refused_and_named():
    half, full = (MasterAdamW(weights(dtype), **OPTIONS) for dtype in (torch.bfloat16, torch.float32))
    with pytest.raises(ValueError, match="--precision: 2 parameters need float32 masters, the state has 0"):
        half.load_state_dict(full.state_dict())
    with pytest.raises(ValueError, match="--precision: 0 parameters need float32 masters, the state has 2"):
        full.load_state_dict(half.state_dict())
