"""Two processes, started once with torchrun: this file is also the program that they run (`python -m`, below)."""

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from grpo import distributed
from grpo.config import Config
from grpo.runlog import Phases
from grpo.update import freeze, update
from tests.helpers import gradients, parameters, relative, rollouts, sgd, some_videos, tiny_policy

W, N, G, T = 2, 6, 3, 5  # processes, videos of all of them, answers per video, answer tokens
CONFIG = Config(videos_per_step=N, group_size=G, max_new_tokens=T, micro_batch=N, beta=0.1, grad_clip=1e9)
UPDATES = {
    "sequence": replace(CONFIG, loss_mean="sequence"),
    "token": replace(CONFIG, loss_mean="token", inner_epochs=2),
    "micro-batches": replace(CONFIG, loss_mean="constant", micro_batch=2),
    "checkpointing": replace(CONFIG, gradient_checkpointing=True),
    "fsdp": replace(CONFIG, parallel="fsdp", loss_mean="token", inner_epochs=2),
    "fsdp, micro-batches": replace(CONFIG, parallel="fsdp", micro_batch=2, gradient_checkpointing=True),
}
SHARED = torch.arange(15.0).view(5, 3)
ROWS = [[{"text": "größer 中文 🙂 \u2028"}], [{"text": "a"}, {"text": None, "score": 1.5}, {"text": ""}]]  # by process


def updated(config, rank=0, world_size=1, broken=()):
    """Parameters, gradients and metrics after two updates, this process having its share of the videos.

    broken: the numbers, from 0, of the backward passes of this process whose gradient is not finite.
    """
    policy = tiny_policy(seed=rank)  # only the first process has the weights that all are to train
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    passes, nan = itertools.count(), 1.0
    if config.parallel == "fsdp":
        distributed.shard(policy, policy.layers())
        nan = torch.nan if broken else 1.0  # no gradient passes by the hooks of a shared parameter
    else:
        next(policy.parameters()).register_hook(lambda g: g * torch.nan if next(passes) in broken else g)
    module, reference, optimizer = distributed.wrap(policy), tiny_policy(seed=1), sgd(policy)
    for seed in range(2):
        share = slice(rank * N // world_size, (rank + 1) * N // world_size)
        videos, groups, advantages = (part[share] for part in rollouts(policy, N, G, T, seed))
        batch = freeze(videos, groups, advantages * nan, module, reference, config)
        metrics = update(module, optimizer, batch, 0.01, config, Phases())
    return put_together(parameters(policy)), put_together(gradients(policy)), metrics


def put_together(shares):
    """Whole tensors, on all processes."""
    return {name: distributed.laid_out(x, torch.empty(0)) for name, x in shares.items()}


def uneven(rank):
    """What the processes read, and score afterwards, where only the first has a video to answer to."""
    policy = tiny_policy()
    videos, ids = some_videos(policy, 1), torch.tensor([[[5, 6]]])
    distributed.shard(policy, policy.layers())
    with distributed.gathered(policy):
        texts = policy.texts(policy.greedy(policy.encode(videos), T)) if rank == 0 else None
    return texts, policy(videos, ids).logprobs.detach(), sum(p.to_local().numel() for p in policy.parameters())


def refused(rank, device) -> str:
    def call():
        raise ValueError(f"--flag of {rank}")

    with pytest.raises(ValueError) as error:
        distributed.from_main(call, device)
    return str(error.value)


def work(folder: Path) -> None:
    """What each of the processes does; it leaves its results in the folder."""
    device = distributed.setup("cpu")
    rank = distributed.rank()
    x = torch.arange(6.0).view(3, 2) + 100 * rank
    called: list[int] = []
    results = {
        "gather": distributed.gather(x),
        "gather of a view": distributed.gather(x.T),
        "gather of bools": distributed.gather(x > 3),
        "total": distributed.total(x),
        "x": x,
        "total of each": distributed.total_of_each({"a": 1.5 + rank, "b": 10**12}, device),
        "rows": distributed.gather_rows(ROWS[rank], device),
        "no rows": distributed.gather_rows(ROWS[1] if rank else [], device),
        "updates": {name: updated(config, rank, W) for name, config in UPDATES.items()},
        "broken": {name: updated(UPDATES[name], rank, W, range(4 * rank)) for name in ("sequence", "fsdp")},
        "broken later": updated(UPDATES["token"], rank, W, broken=[3] if rank == 1 else ()),
        "main": distributed.is_main(),
        "shares": [distributed.share(rows).to_local() for rows in (SHARED, SHARED[:1])],
        "put together": distributed.whole({"a": [distributed.share(SHARED)], "b": SHARED[0], "c": "d"}),
        "uneven": uneven(rank),
        "from main": distributed.from_main(lambda: [called.append(rank), "of", rank][1:], device),
        "refused": refused(rank, device),
        "called": called,
    }
    distributed.barrier()
    torch.save(results, folder / f"{rank}.pt")
    distributed.close()


if __name__ == "__main__":
    work(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(W)]
    done = subprocess.run(
        [*torchrun, "-m", "tests.test_distributed", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(W)]


def test_gather_joins_in_rank_order(results):
    first, second = (result["x"] for result in results)
    for result in results:
        assert torch.equal(result["gather"], torch.cat([first, second]))
        assert torch.equal(result["gather of a view"], torch.cat([first.T, second.T]))
        assert torch.equal(result["gather of bools"], torch.cat([first, second]) > 3)
    assert torch.equal(second - first, torch.full((3, 2), 100.0))


def test_totals_are_sums_and_leave_their_input_alone(results):
    for result in results:
        assert torch.equal(result["total"], results[0]["x"] + results[1]["x"])
        assert result["total of each"] == {"a": 4.0, "b": 2.0 * 10**12}


def test_rows_of_all_processes_arrive_in_rank_order(results):
    for result in results:
        assert result["rows"] == ROWS[0] + ROWS[1]
        assert result["no rows"] == ROWS[1]


def test_the_first_process_is_the_main_one(results):
    assert [result["main"] for result in results] == [True, False]


def test_what_the_main_process_finds_or_refuses_all_find_or_refuse(results):
    assert [result["called"] for result in results] == [[0], []]
    assert [result["from main"] for result in results] == [["of", 0]] * 2
    assert [result["refused"] for result in results] == ["--flag of 0"] * 2


@pytest.mark.parametrize("name", UPDATES)
def test_two_processes_make_the_update_of_one(results, name):
    *expected, expected_metrics = updated(UPDATES[name])
    for result in results:
        *got, metrics = result["updates"][name]
        assert metrics == pytest.approx(expected_metrics, rel=1e-4)
        for values, expected_values in zip(got, expected):
            for parameter, value in expected_values.items():
                assert relative(values[parameter], value) < 1e-5, parameter
    first, second = (result["updates"][name][0] for result in results)
    assert all(torch.equal(first[parameter], second[parameter]) for parameter in first)


@pytest.mark.parametrize("name", ["sequence", "fsdp"])
def test_a_gradient_that_breaks_in_one_process_changes_no_weight_in_any(results, name):
    before = parameters(tiny_policy(seed=0))
    for result in results:
        got, _, metrics = result["broken"][name]
        assert metrics["skipped"] == UPDATES[name].inner_epochs and metrics["grad_norm"] is None
        assert all(torch.equal(got[parameter], before[parameter]) for parameter in before)


def test_rows_are_shared_and_put_together_on_the_first(results):
    one, other = (result["shares"] for result in results)
    assert torch.equal(torch.cat([one[0], other[0]]), SHARED) and len(one[0]) == 3
    assert torch.equal(one[1], SHARED[:1]) and other[1].shape == (0, 3)
    for result, expected in zip(results, (SHARED, None)):
        got = result["put together"]
        assert torch.equal(got["b"], SHARED[0]) and got["c"] == "d"
        assert (got["a"] == [None]) if expected is None else torch.equal(got["a"][0], expected)


def test_processes_with_a_whole_policy_may_do_different_things_and_then_share_it_again(results):
    policy = tiny_policy()
    videos, ids = some_videos(policy, 1), torch.tensor([[[5, 6]]])
    expected = policy.texts(policy.greedy(policy.encode(videos), T))
    assert [result["uneven"][0] for result in results] == [expected, None]
    for _, logprobs, _ in (result["uneven"] for result in results):
        torch.testing.assert_close(logprobs, policy(videos, ids).logprobs.detach())
    held = [result["uneven"][2] for result in results]
    every = sum(p.numel() for p in policy.parameters())
    assert sum(held) == every and max(held) < 0.55 * every


def test_a_second_pass_that_breaks_in_one_process_is_left_out_in_all(results):
    expected, _, expected_metrics = updated(UPDATES["token"], broken=[3])
    assert expected_metrics["skipped"] == 1
    for result in results:
        got, _, metrics = result["broken later"]
        assert metrics["skipped"] == 1 and metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-4)
        assert all(relative(got[parameter], value) < 1e-5 for parameter, value in expected.items())
        assert all(torch.equal(got[parameter], results[0]["broken later"][0][parameter]) for parameter in got)


def test_one_process_needs_none_of_it():
    x, rows = torch.arange(6.0).view(3, 2), [{"text": "größer"}]
    assert torch.equal(distributed.gather(x), x) and torch.equal(distributed.total(x), x)
    assert distributed.total_of_each({"a": 1.5, "b": 2}, x.device) == {"a": 1.5, "b": 2.0}
    assert distributed.gather_rows(rows, x.device) == rows
    assert distributed.from_main(lambda: rows, x.device) is rows and refused(0, x.device) == "--flag of 0"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    module = torch.nn.Linear(1, 1)
    assert distributed.wrap(module) is module and distributed.shard(module, []) is module
    assert distributed.share(x) is x and distributed.laid_out(x, x) is x and distributed.whole([x])[0] is x
    with distributed.gathered(module):
        pass
    distributed.barrier()
    distributed.close()
    assert distributed.setup("cpu") == torch.device("cpu") and not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device cuda"):
        distributed.setup("cuda")
    assert distributed.setup("auto") == torch.device("cpu")


def test_processes_meet_anew_in_a_store_that_is_full_of_earlier_starts():
    """Others may be there first, and then find what a process 0 left that is gone."""
    store, W, seen = HashStore(), 3, []
    for late in (0, 1, 0, 2):
        with ThreadPoolExecutor(W) as pool:
            order = sorted(range(W), key=lambda rank: rank == late)
            starts = []
            for rank in order:
                starts.append(pool.submit(distributed.meet, store, rank, W, 20))
                time.sleep(0.2)
            (name,) = {start.result() for start in starts}
        seen.append(name)
    assert len(set(seen)) == 4


def test_a_process_that_nobody_meets_says_so():
    store = HashStore()
    store.set("start", "of a process that is gone")
    with pytest.raises(TimeoutError, match="process 1 has waited"):
        distributed.meet(store, 1, 2, 0.2)
