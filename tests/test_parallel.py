"""Runs of a few steps on one, two and four processes, in all ways to share the work: the same numbers.

Each number of processes is started once with torchrun: this file is also the program that they run.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

import train
from grpo import checkpoint, distributed
from grpo.advantages import group_advantages
from grpo.config import Config
from grpo.master_weights import MasterAdamW
from grpo.rollout import answer_uniforms, sample_groups
from grpo.runlog import Phases
from grpo.update import freeze, update
from models.footprint import Network, Step, inventory
from models.loading import load_policy, save_policy
from models.slowfast import SlowFastConfig
from tests.helpers import motion_policy, relative, some_videos

N, G, T, STEPS, RATE = 4, 3, 5, 3, 0.01  # videos of all processes, answers per video, tokens, steps, learning rate
BASE = Config(videos_per_step=N, group_size=G, max_new_tokens=T, rewards="ranking", loss_mean="token", beta=0.1)
WAYS = {
    "ddp": BASE,
    "sharded optimizer": replace(BASE, shard_optimizer=True, micro_batch=2),
    "fsdp": replace(BASE, parallel="fsdp"),
}
ON_TWO = WAYS | {
    "ddp in micro-batches": replace(BASE, micro_batch=1),
    "fsdp in micro-batches": replace(BASE, parallel="fsdp", micro_batch=1, gradient_checkpointing=True),
    "fsdp of fewer parts": replace(BASE, parallel="fsdp", freeze="vision,projector"),
    "fsdp, mixed": replace(BASE, parallel="fsdp", precision="mixed"),
    **{f"{name}, bfloat16": replace(config, precision="bfloat16", micro_batch=2) for name, config in WAYS.items()},
}
RESUMED = {  # name: how a run goes on from its checkpoint
    "ddp": "sharded optimizer",
    "sharded optimizer": "fsdp",
    "fsdp": "ddp",
    "sharded optimizer, bfloat16": "sharded optimizer, bfloat16",
    "fsdp, bfloat16": "fsdp, bfloat16",
}


def learn(config, weights, rank=0, world_size=1, folder=None, resume=None):
    """Steps of sampling, ranking among all videos, and AdamW; what they come to, on the first process.

    The first process's weights are for all: `weights/0`. A score is made of an answer's tokens, so all can be read.
    The last step but one is saved in `folder`, if there is one; `resume` is what to go on from.
    """
    device, first = torch.device("cpu"), 1
    policy = train.load(config, str(resume or weights / str(min(rank, 1))), device)
    policy.freeze(config.freeze.split(",") if config.freeze else [])
    reference = train.load(config, str(weights / "0"), device).requires_grad_(False)
    module = distributed.wrap(policy)  # before masters are made
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = MasterAdamW(trained, config.shard_optimizer, eps=1e-3)  # far above rounding, so that it stays small
    if resume:
        checkpoint.load_optimizer(resume, optimizer)
        first = checkpoint.read_state(resume)["step"] + 1
    table = train.reward_table(config)
    share = slice(rank * N // world_size, (rank + 1) * N // world_size)
    made, gradients, take_step = {"texts": [], "metrics": []}, {}, optimizer.step

    def step_and_note():
        shares = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
        gradients.update(distributed.whole(shares))
        take_step()

    optimizer.step = step_and_note
    for step in range(first, STEPS + 1):
        videos = some_videos(policy, N, seed=step)[share]
        uniforms = torch.stack([answer_uniforms(0, step, clip, G, T) for clip in range(N)])[share]
        with distributed.gathered(policy):
            videos = policy.watch(videos)
            groups = sample_groups(policy, videos, uniforms)
        scores = 1 + (groups.ids * groups.mask).sum(-1) % 401 / 100
        texts = [[f"<think>so</think><answer>{score:.2f}</answer>" for score in row] for row in scores.tolist()]
        batch = SimpleNamespace(targets=torch.linspace(1, 5, N)[share], perturbed_ok=torch.ones(len(videos)).bool())
        scored = table(**train.to_judge(table, replace(groups, texts=texts), groups[:0], batch, device))
        frozen = freeze(videos, groups, group_advantages(scored.total), module, reference, config)
        made["metrics"].append(update(module, optimizer, frozen, RATE, config, Phases()))
        texts = [{"text": text} for row in groups.texts for text in row]
        made["texts"].append([row["text"] for row in distributed.gather_rows(texts, device)])
        state, model = distributed.whole(optimizer.state_dict()), distributed.whole(policy.weights())
        if distributed.is_main() and folder and step == STEPS - 1:
            save_model = partial(save_policy, policy, weights=model)
            checkpoint.save_checkpoint(folder, {"step": step}, save_model, state, keep=1)
    distributed.barrier()
    moments = [x for row in optimizer.state.values() for name, x in row.items() if name != "step"]
    held = {"weights": policy.parameters(), "optimizer": [*moments, *optimizer.saved()]}
    made["bytes"] = {name: sum(map(bytes_here, tensors)) for name, tensors in held.items()}
    return {**made, "gradients": gradients, "parameters": model, "masters": state["masters"]}


def bytes_here(x):
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes


def work(weights, folder):
    """What each of the processes does; it leaves its results in the folder."""
    distributed.setup("cpu")
    rank, world_size = distributed.rank(), distributed.world_size()
    results = {}
    for name, config in (ON_TWO if world_size == 2 else WAYS).items():
        saved = folder / name if world_size == 2 and name in RESUMED else None
        results[name] = learn(config, weights, rank, world_size, saved)
    for name, other in RESUMED.items() if world_size == 2 else ():
        (saved,) = checkpoint.step_folders(folder / name)
        results[f"{name}, resumed"] = learn(ON_TWO[other], weights, rank, world_size, resume=saved)
    torch.save(results, folder / f"{rank}.pt")
    distributed.close()


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with two models, the second not to be trained: the first process's weights are for all."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(2):
        policy = motion_policy(seed)
        policy.model.generation_config.eos_token_id = [*range(7, 40)]  # answers that differ in length
        save_policy(policy, folder / str(seed))
    return folder


def started(weights, folder, world_size):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    done = subprocess.run(
        [*torchrun, "-m", "tests.test_parallel", str(weights), str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def on_two(weights, tmp_path_factory):
    return started(weights, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def on_four(weights, tmp_path_factory):
    return started(weights, tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def alone(weights):
    """Runs of one process, by precision and what is frozen."""
    made = {}

    def run(config):
        key = config.precision, config.freeze
        if key not in made:
            plain = replace(BASE, precision=config.precision, freeze=config.freeze)
            made[key] = learn(plain, weights)
        return made[key]

    return run


def check_same(found, expected):
    """Texts are equal; losses, gradients and parameters within 1e-5, and what is not trained stays."""
    steps = len(found["texts"])
    assert found["texts"] == expected["texts"][-steps:]
    for one, other in zip(found["metrics"], expected["metrics"][-steps:]):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-8)
    for kind in ("gradients", "parameters"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            one = found[kind][name]
            assert torch.equal(one, value) or relative(one, value) < 1e-5, (kind, name)


@pytest.mark.parametrize("way", WAYS)
def test_four_processes_learn_what_one_does(on_four, alone, way):
    check_same(on_four[0][way], alone(BASE))


@pytest.mark.parametrize("way", [name for name, config in ON_TWO.items() if config.precision == "float32"])
def test_two_processes_learn_what_one_does(on_two, alone, way):
    check_same(on_two[0][way], alone(ON_TWO[way]))


@pytest.mark.parametrize("size", [3, 1])
def test_one_process_learns_the_same_in_micro_batches(weights, alone, size):
    check_same(learn(replace(BASE, micro_batch=size), weights), alone(BASE))


def test_the_run_is_worth_comparing(alone, weights):
    made, before = alone(BASE), load_policy(str(weights / "0")).weights()
    trained = {name: value for name, value in made["parameters"].items() if "slowfast" not in name}
    assert min(relative(value, before[name]) for name, value in trained.items()) > 1e-3
    assert len({len(text) for step in made["texts"] for text in step}) > 3
    assert all(abs(row["loss"]) > 1e-4 and row["kl"] >= 0 for row in made["metrics"])


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_a_checkpoint_in_its_own_way_or_another(on_two, name):
    whole, resumed = on_two[0][name], on_two[0][f"{name}, resumed"]
    if "bfloat16" not in name:
        check_same(resumed, whole)
        return
    assert len(resumed["masters"]) == len(whole["gradients"]) and resumed["texts"] == whole["texts"][-1:]
    for kind in ("parameters", "masters"):
        one, other = (list(x.values()) if isinstance(x, dict) else x for x in (whole[kind], resumed[kind]))
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_half_precision_is_the_same_with_a_shared_optimizer_and_alike_when_all_is_shared(on_two):
    ddp, shared, fsdp = (on_two[0][f"{way}, bfloat16"] for way in WAYS)
    assert {x.dtype for name, x in ddp["parameters"].items() if "slowfast" not in name} == {torch.bfloat16}
    assert shared["texts"] == ddp["texts"] and shared["metrics"] == ddp["metrics"]
    for found, tolerance in ((shared, 0), (fsdp, 0.05)):
        assert len(found["masters"]) == len(ddp["masters"])
        assert all(relative(one, other) <= tolerance for one, other in zip(found["masters"], ddp["masters"]))


def test_mixed_precision_starts_at_the_reference_and_near_what_autocast_computes(on_two, alone):
    found, expected = on_two[0]["fsdp, mixed"], alone(ON_TWO["fsdp, mixed"])
    first, *later = found["metrics"]
    assert first["kl"] == 0.0 and first["ratio"] == 1.0 and all(row["kl"] > 0 for row in later)
    assert first["grad_norm"] == pytest.approx(expected["metrics"][0]["grad_norm"], rel=0.05)
    assert first["grad_norm"] != pytest.approx(alone(BASE)["metrics"][0]["grad_norm"], rel=1e-4)
    assert {x.dtype for x in found["gradients"].values()} == {torch.float32}


@pytest.mark.parametrize(("way", "precision"), [(way, kind) for way in WAYS for kind in ("float32", "bfloat16")])
def test_each_process_holds_what_is_estimated(on_two, on_four, weights, way, precision):
    config = load_policy(str(weights / "0")).model.config
    motion = SlowFastConfig(**config.motion)
    counts = inventory(config, motion, [])
    runs = [on_two] + [on_four] * (precision == "float32")
    for results in runs:
        step = Step(
            videos=1, copies=1, micro_batch=1, frames=2, side=96, prompt=1, answers=G, tokens=T, precision=precision,
            checkpointing=False, reference=True, processes=len(results), parallel=WAYS[way].parallel,
            shard_optimizer=WAYS[way].shard_optimizer,
        )  # fmt: skip
        states = Network(config, motion, counts, step).states()
        name = way if precision == "float32" else f"{way}, {precision}"
        for kind in ("weights", "optimizer"):
            held = [result[name]["bytes"][kind] for result in results]
            assert sum(held) / len(held) == pytest.approx(states[kind], rel=0.01)
            assert max(held) == pytest.approx(states[kind], rel=0.1)
