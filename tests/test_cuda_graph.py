from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from grpo.config import parse_config
from models import sampling
from models.cuda_graph import Recorded
from tests.helpers import generator, motion_policy, some_videos, tiny_policy
from train import prepare

READ_BACK = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on any device: the operations of the second call, repeated on the same tensors."""

    repeated = 0

    def __init__(self, work: Callable[[], None]):
        super().__init__()
        self.work, self.calls, self.operations = work, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 1:
            self.work()
        elif self.calls == 2:
            with self:
                self.work()
            assert not READ_BACK & {function for function, *_ in self.operations}
        else:
            Tape.repeated += 1
            self.repeat()

    def repeat(self) -> None:
        made = {}  # tensor of the second call -> of this one
        for function, args, kwargs, out in self.operations:
            args, kwargs = tree_map(lambda x, made=made: made.get(id(x), x), (args, kwargs))
            again = function(*args, **kwargs)
            made |= {id(one): other for one, other in zip(tree_leaves(out), tree_leaves(again))}


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_policy, motion_policy])
def test_the_token_step_can_be_repeated_as_it_was_recorded(monkeypatch, make, precision):
    policy = make().eval()
    policy.autocast_dtype = torch.bfloat16 if precision == "mixed" else None
    if precision == "bfloat16":
        policy.model.bfloat16()
    policy.end_ids = torch.arange(12)  # so that answers leave the batch
    videos, uniforms = policy.watch(some_videos(policy, N=3)), torch.rand(3, 4, 40, generator=generator(2))
    monkeypatch.setitem(sampling.SYNC_EVERY, "cpu", 4)
    monkeypatch.setattr(Tape, "repeated", 0)
    monkeypatch.setattr(sampling, "Recorded", Tape)
    prefix = policy.encode(videos)
    for top_p in (1.0, 0.9):
        plain = policy.sample(prefix, uniforms, top_p)
        policy.cuda_graph = True
        recorded = policy.sample(prefix, uniforms, top_p)
        policy.cuda_graph = False
        assert torch.equal(recorded.ids, plain.ids) and torch.equal(recorded.mask, plain.mask)
        torch.testing.assert_close(recorded.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    assert Tape.repeated > 20


def test_a_cuda_graph_needs_cuda(tmp_path):
    config = parse_config(["--cuda-graph", "--device", "cpu", "--output", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--cuda-graph: goes with a CUDA device, not with cpu"):
        prepare(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_loop_counts_on():
    count = torch.zeros(1, device="cuda")
    again = Recorded(lambda: count.add_(1))
    for _ in range(5):
        again()
    assert count.item() == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
def test_the_same_tokens_with_and_without_a_cuda_graph(precision):
    policy = tiny_policy(ends=list(range(12))).eval().cuda()
    policy.autocast_dtype = torch.bfloat16 if precision == "mixed" else None
    if precision == "bfloat16":
        policy.model.bfloat16()
    prefix = policy.encode(some_videos(policy, N=3))
    uniforms = torch.rand(3, 4, 60, generator=generator(2))
    plain = policy.sample(prefix, uniforms)
    policy.cuda_graph = True
    recorded = policy.sample(prefix, uniforms)
    assert (recorded.ids == plain.ids).float().mean() > (0.99 if precision == "float32" else 0.8)
