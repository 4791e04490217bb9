"""LoRA adapters: what they compute, what they train, and that their checkpoints say all that the base does not."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from data import synthetic
from grpo.config import parse_config
from models import lora
from models.checkpoints import convert
from models.internvl import VQAThinker, load_vqathinker
from models.loading import ATTENTION, PRECISIONS, check_checkpoint, load_policy, save_policy
from models.lora import Adapter
from tests.helpers import motion_policy, plain_model, relative, some_ids, some_videos, tiny_policy

peft = pytest.importorskip("peft", reason="needs peft: pip install 'vqathinker[lora]'")

ROOT = Path(__file__).resolve().parents[1]
N, G, T, RANK, ALPHA = 2, 3, 5, 4, 6
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def add(policy, base="base", **options):
    policy.adapter = Adapter(policy.model, str(base), RANK, ALPHA, **options)
    return policy


def trained(policy):
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def learn(policy, seed=1):
    """Other weights for all that is trained, as after some steps."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return policy


def by_hand(policy, plain):
    """`plain`, a policy without adapter, with the weights that the adapter of `policy` stands for."""
    values = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            module, _, kind = name.rpartition(".")
            if f"{module}.base_layer.{kind}" in values:
                A, B = (values.get(f"{module}.lora_{x}.default.weight") for x in "AB")
                parameter += ALPHA / RANK * B @ A if kind == "weight" else 0
            elif ".motion_projector." in name:
                parameter.copy_(values[name.replace("projector.", "projector.modules_to_save.default.")])
    return plain


def logprobs(policy, seed=0):
    return policy(some_videos(policy, N, seed=seed), some_ids(policy, N, G, T, seed)).logprobs


# ---- the network


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [tiny_policy, motion_policy])
def test_a_new_adapter_changes_nothing_and_switched_off_it_never_has(make, precision):
    policy = make()
    dtype, policy.autocast_dtype = PRECISIONS[precision]
    policy.model.to(dtype)
    before = logprobs(policy)
    add(policy)
    assert {p.dtype for p in trained(policy).values()} == {dtype}
    videos, ids = some_videos(policy, N), some_ids(policy, N, G, T)
    assert torch.equal(logprobs(policy), before)
    learn(policy)
    assert not torch.equal(logprobs(policy), before)
    assert torch.equal(policy.without_adapter(videos, ids).logprobs, before)
    assert not torch.equal(logprobs(policy), before)  # and it is switched on again
    assert len(trained(policy)) == 14 * len(policy.model.model.language_model.layers) + 6 * (make is motion_policy)


@pytest.mark.parametrize("make", [tiny_policy, motion_policy])
def test_adapters_and_the_motion_projector_are_trained_alone(make):
    policy = add(make())
    layers = range(len(policy.model.model.language_model.layers))
    modules = [f"model.model.language_model.layers.{layer}.{name}" for layer in layers for name in LINEAR]
    expected = {f"{module}.lora_{x}.default.weight" for module in modules for x in "AB"}
    if make is motion_policy:
        parts = [f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")]
        expected |= {f"model.model.motion_projector.modules_to_save.default.{part}" for part in parts}
    assert trained(policy).keys() == expected
    assert policy.watch(some_videos(policy, N)).visual is not None  # the vision tower is frozen: once a step
    learn(policy)
    logprobs(policy).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained(policy).values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_are_those_of_the_weights_that_it_stands_for(checkpointing):
    policy = learn(add(motion_policy()))
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = by_hand(policy, motion_policy())
    found, expected = logprobs(policy), logprobs(whole)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(expected, logprobs(motion_policy()), atol=0.1)
    found.sum().backward()
    expected.sum().backward()
    values = dict(policy.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in values:
            A, B = (values[f"{module}.lora_{x}.default.weight"] for x in "AB")
            assert relative(A.grad, ALPHA / RANK * B.T @ parameter.grad) < 1e-3, name
            assert relative(B.grad, ALPHA / RANK * parameter.grad @ A.T) < 1e-3, name
        elif "motion_projector" in name:
            own = values[name.replace("projector.", "projector.modules_to_save.default.")]
            assert relative(own.grad, parameter.grad) < 1e-3, name


def test_the_sampler_draws_from_what_is_trained():
    policy = learn(add(motion_policy()))
    policy.end_ids.fill_(-1)
    videos = some_videos(policy, N)
    answers = policy.sample(policy.encode(videos), torch.rand(N, G, T))
    torch.testing.assert_close(answers.logprobs, policy(videos, answers.ids).logprobs, atol=2e-4, rtol=1e-4)


def test_the_seed_alone_says_how_it_begins():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = add(tiny_policy()).adapter.weights()
    torch.manual_seed(8)
    again, other = (add(tiny_policy(), seed=seed).adapter.weights() for seed in (0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    policy = tiny_policy()
    torch.set_rng_state(state)
    add(policy)
    assert torch.equal(torch.get_rng_state(), state)


# ---- checkpoints


@pytest.fixture
def base(tmp_path):
    save_policy(motion_policy(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base, tmp_path):
    """A folder with an adapter of `base`, and the policy that it was saved from."""
    policy = learn(add(load_policy(str(base)), base))
    save_policy(policy, tmp_path / "adapter")
    return tmp_path / "adapter", policy


def test_a_checkpoint_is_an_adapter_and_comes_back_as_it_was(base, saved):
    folder, policy = saved
    files = sorted(file.name for file in folder.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    weights = load_file(folder / "adapter_model.safetensors")
    assert sum(x.numel() for x in weights.values()) == sum(p.numel() for p in trained(policy).values())
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    again = add(load_policy(str(base)), base, seed=5)
    again.adapter.load(folder)
    assert torch.equal(logprobs(again), logprobs(policy))


def test_loaded_as_a_model_it_is_merged_and_can_be_trained_in_full(saved):
    folder, policy = saved
    merged = load_policy(str(folder))
    torch.testing.assert_close(logprobs(merged), logprobs(policy), atol=2e-4, rtol=1e-4)
    names = {name for name, _ in motion_policy().named_parameters()}
    assert {name for name, _ in merged.named_parameters()} == names
    assert trained(merged).keys() == {name for name in names if ".slowfast." not in name}


def test_plain_peft_loads_it(base, saved):
    folder, _ = saved
    model = VQAThinker.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    expected = plain_model(load_policy(str(folder))).eval()
    policy = load_policy(str(base))
    videos = some_videos(policy, N)
    inputs = {"input_ids": videos.prompt_ids, "pixel_values": policy.pixels(videos.frames).flatten(0, 1)}
    with torch.no_grad():
        found = model(**inputs).logits
        torch.testing.assert_close(found, expected(**inputs).logits, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(found, plain_model(policy)(**inputs).logits, atol=0.1)


def test_merging_writes_a_whole_checkpoint(saved, tmp_path, capsys):
    folder, policy = saved
    (folder / "recipe.json").write_text('{"frames": 3}')
    assert lora.main(["merge", str(folder), str(tmp_path / "whole")]) == 0
    assert lora.base_of(str(tmp_path / "whole")) is None
    assert (tmp_path / "whole" / "recipe.json").read_text() == '{"frames": 3}'
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "whole"))), logprobs(policy), atol=2e-4, rtol=1e-4)
    assert lora.main(["merge", str(folder), str(tmp_path / "half"), "--precision", "bfloat16"]) == 0
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {x.dtype for name, x in half.items() if "slowfast" not in name} == {torch.bfloat16}
    capsys.readouterr()
    for arguments, named in (
        ([str(tmp_path / "whole"), str(tmp_path / "new")], f"ADAPTER {tmp_path / 'whole'}: no adapter_config.json"),
        ([str(folder), str(tmp_path / "whole")], f"OUTPUT {tmp_path / 'whole'}: exists already"),
    ):
        assert lora.main(["merge", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"lora: error: {named}")


def test_an_adapter_of_an_adapter(saved, tmp_path):
    folder, _ = saved
    policy = learn(add(load_policy(str(folder)), folder), seed=2)
    save_policy(policy, tmp_path / "second")
    assert lora.root_of(str(tmp_path / "second")) == str(folder.with_name("base"))
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "second"))), logprobs(policy), atol=2e-4, rtol=1e-4)


def test_a_base_without_motion_gets_its_slowfast_from_the_adapter(tmp_path):
    """As with --slowfast: the motion token is new, and the base stays an InternVL."""
    policy, slowfast = tiny_policy(), motion_policy().model.model.slowfast
    save_policy(policy, tmp_path / "base")
    with pytest.warns(UserWarning, match="the motion projector is new"):
        policy.model = load_vqathinker(tmp_path / "base", slowfast, attn_implementation=ATTENTION)
    learn(add(policy.train(), tmp_path / "base", with_slowfast=True))
    save_policy(policy, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is not new any more
        merged = load_policy(str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(merged), logprobs(policy), atol=2e-4, rtol=1e-4)
    for name, value in slowfast.state_dict().items():
        assert torch.equal(merged.model.model.slowfast.state_dict()[name], value)


def test_without_motion_it_stays_without(base, tmp_path):
    policy = learn(add(load_policy(str(base), motion="none"), base))
    save_policy(policy, tmp_path / "adapter")
    merged = load_policy(str(tmp_path / "adapter"))
    assert not merged.has_motion
    torch.testing.assert_close(logprobs(merged), logprobs(policy), atol=2e-4, rtol=1e-4)


def refused(call, *fragments):
    with pytest.raises(ValueError) as error:
        call()
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_what_is_wrong_with_an_adapter_is_named(base, saved, tmp_path, monkeypatch):
    folder, _ = saved
    other = load_policy(str(base))
    other.adapter = Adapter(other.model, str(base), RANK + 1, ALPHA)
    refused(lambda: other.adapter.load(folder), f"{folder}: not an adapter of this network", "mismatched", "(4, ")
    refused(lambda: load_policy(str(folder), motion="none"), "--motion none", str(folder))
    refused(lambda: convert(folder, tmp_path / "released"), f"{folder}: a LoRA adapter", "models.lora merge")

    weights = load_file(folder / "adapter_model.safetensors")
    dropped = weights.popitem()
    save_file(weights, folder / "adapter_model.safetensors")
    refused(lambda: load_policy(str(folder)), f"{folder}: not an adapter", "1 missing keys", dropped[0])
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    refused(lambda: load_policy(str(folder)), f"{folder / 'adapter_model.safetensors'}: cannot be read")

    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    refused(lambda: check_checkpoint(str(folder)), f"--model {folder}", "pip install 'vqathinker[lora]'")
    monkeypatch.undo()
    shutil.rmtree(base)
    refused(lambda: check_checkpoint(str(folder)), f"--model {folder}: an adapter of {base}: ", "no such folder")
    for text, reason in (("{", "adapter_config.json: "), ('{"peft_type": "IA3"}', "peft_type is 'IA3'")):
        (folder / "adapter_config.json").write_text(text)
        refused(lambda: check_checkpoint(str(folder)), f"--model {folder}: ", reason)


# ---- runs

SMALL = "--steps 2 --videos-per-step 4 --group-size 3 --max-new-tokens 48 --workers 0 --eval-every 2 --save-every 1"
SMALL = shlex.split(f"{SMALL} --lr 4e-3 --warmup-steps 0 --lora-rank 4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    labels = synthetic.write_clips(folder, {"train": 9, "val": 4, "test": 5}, seed=11)
    return ["--labels", str(labels), "--videos", str(folder)]


def run(clips, output, *flags):
    assert train.main(parse_config([*SMALL, *clips, "--output", str(output), *flags])) == 0
    return Path(output)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run, and in `networks` how many were built for it."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_policy", lambda *a, **k: made.append(load_policy(*a, **k)) or made[-1])
        folder = run(clips, tmp_path_factory.mktemp("runs") / "lora")
    (folder / "networks").write_text(str(len(made)))
    return folder


def test_a_run_holds_one_network_and_starts_at_its_reference(finished):
    metrics = rows(finished / "metrics.jsonl")
    assert (finished / "networks").read_text() == "1"
    assert metrics[0]["kl"] == 0.0 and metrics[1]["kl"] > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_writes_the_same_bytes(clips, finished, tmp_path, precision):
    whole = finished if precision == "float32" else run(clips, tmp_path / "whole", "--precision", precision)
    shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_000002")
    run(clips, tmp_path / "half", "--precision", precision, "--resume", "auto")
    for name in ("adapter_model.safetensors", "optimizer.pt", "adapter_config.json", "config.json", "recipe.json"):
        one, other = (folder / "checkpoints" / "step_000002" / name for folder in (whole, tmp_path / "half"))
        assert one.read_bytes() == other.read_bytes(), name
    state = torch.load(one.with_name("optimizer.pt"), weights_only=True)
    assert len(state["masters"]) == (
        len(load_file(one.with_name("adapter_model.safetensors"))) * (precision != "float32")
    )


def test_a_checkpoint_is_scored_and_trained_on(clips, finished, tmp_path, capsys):
    arguments = ["--model", str(finished / "best"), *clips, "--output", str(tmp_path / "eval")]
    assert evaluate.main(evaluate.parse_arguments(arguments)) == 0
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    after = json.loads((finished / "summary.json").read_text())["after"]
    (figures,) = found["datasets"].values()
    assert figures["rmse"] == pytest.approx(after["rmse"], abs=1e-3) and found["recipe"]["max_new_tokens"] == 48
    for rank in (3, 0):  # a new adapter on the merged model, or all of it
        output = run(clips, tmp_path / f"next-{rank}", "--model", str(finished / "best"), f"--lora-rank={rank}")
        before = json.loads((output / "summary.json").read_text())["before"]
        assert before["rmse"] == pytest.approx(after["rmse"], abs=1e-3)
        assert lora.base_of(str(output / "best")) == (str(finished / "best") if rank else None)
    assert load_policy(str(tmp_path / "next-3" / "best")).has_motion
    assert train.main(parse_config(["--dry-run", *SMALL, "--model", str(finished / "best")])) == 0
    assert "of text (counted)" in capsys.readouterr().out


def test_two_processes_with_a_shared_optimizer_compute_what_one_does(clips, finished, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    flags = ["--output", str(tmp_path / "two"), "--shard-optimizer", "--gradient-checkpointing"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *SMALL, *clips, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([row["text"] for row in rows(folder / "rollouts.jsonl")] for folder in (finished, tmp_path / "two"))
    assert one == two
    for a, b in zip(*(rows(folder / "metrics.jsonl") for folder in (finished, tmp_path / "two"))):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-2, abs=1e-12)
    one, two = (load_file(folder / "best" / "adapter_model.safetensors") for folder in (finished, tmp_path / "two"))
    start = train.load(parse_config([*SMALL, *clips]), parse_config([]).model, torch.device("cpu")).weights()
    for name, value in one.items():
        assert relative(two[name] - start[name], value - start[name]) < 0.02, name


def test_without_peft_the_command_is_named_before_anything_is_read(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "read_clips", lambda *_: pytest.fail("labels were read"))
    assert train.main(parse_config([*SMALL, *clips, "--output", str(tmp_path / "run")])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "train.py: error: --lora-rank 4: needs peft: pip install 'vqathinker[lora]'"
