"""--inspect: the numbers of a step against plain arithmetic, the page against the numbers, and no trace in the run."""

import copy
import doctest
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo import inspect
from grpo.config import Config
from grpo.inspect import Inspector, counted_repeats, pieces
from grpo.loss import grpo_loss
from grpo.runlog import Phases
from grpo.update import freeze, update
from models.policy import PARTS
from tests import inspected as by_hand
from tests.helpers import generator, gradients, rollouts, sgd, tiny_policy, tokenizer
from tests.inspected import SMALL, G, N, all_answers, check_numbers, lines, read, write_clips, written_page
from tests.pages import Page, check, tables

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"regression": 2, "ranking": 1, "temporal": 0.5, "format": 1}
FLAGS = "--steps 3 --save-every 2 --inner-epochs 3 --grad-clip 0.01 --rewards regression=2,ranking,temporal=0.5,format"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("data") / "clips")


def run(clips, output, *flags):
    return by_hand.run(clips, output, " ".join([FLAGS, *flags]))


@pytest.fixture(scope="module")
def inspected(clips, tmp_path_factory):
    return run(clips, tmp_path_factory.mktemp("runs") / "inspected", "--inspect", "3,1")


@pytest.fixture(scope="module", params=[1, 3])
def found(inspected, request):
    return read(inspected, request.param)


# ---- the run


def test_an_inspected_run_is_the_run_that_was_not(clips, inspected, tmp_path):
    plain = run(clips, tmp_path / "plain")
    assert not (plain / "inspect").exists()
    names = {path.name for path in (inspected / "inspect").iterdir()}
    assert names == {f"step_00000{step}.{kind}" for step in (1, 3) for kind in ("json", "html")}
    for name in ("checkpoints/step_000003/model.safetensors", "checkpoints/step_000003/optimizer.pt", "rollouts.jsonl"):
        assert (plain / name).read_bytes() == (inspected / name).read_bytes()
    for one, other in zip(lines(plain / "metrics.jsonl"), lines(inspected / "metrics.jsonl")):
        assert ("inspect" in other["phase_s"]) == (other["step"] in (1, 3)) and "inspect" not in one["phase_s"]
        for row in (one, other):
            for name in ("phase_s", "tokens_per_s", "peak_memory_mib"):
                del row[name]
        assert one == other
    written = {path.name: path.read_bytes() for path in (plain / "checkpoints" / "step_000003").iterdir()}
    shutil.rmtree(plain / "checkpoints" / "step_000003")
    run(clips, plain, "--resume", "auto", "--inspect", "1,3")
    assert {path.name for path in (plain / "inspect").iterdir()} == {"step_000003.json", "step_000003.html"}
    for name in ("model.safetensors", "optimizer.pt"):
        assert (plain / "checkpoints" / "step_000003" / name).read_bytes() == written[name]
    assert all_answers(read(plain, 3)) == all_answers(read(inspected, 3))


def test_a_step_that_is_not_inspected_has_no_hooks():
    policy = tiny_policy()
    inspector = Inspector(Path(), Config(inspect="2"), policy, sgd(policy), {}, str, "")
    for step, hooks in ((1, 0), (2, 1)):
        with inspector.watching(step) as made:
            assert (made is None) == (not hooks)
            assert len(policy._forward_hooks) == len(inspector.optimizer._optimizer_step_pre_hooks) == hooks
        assert not policy._forward_hooks and not inspector.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("way", ["fsdp", "ddp"])
def test_two_processes_write_what_one_does(clips, inspected, tmp_path, way):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    flags = [*shlex.split(f"{SMALL} {FLAGS}"), *clips, "--output", str(tmp_path / "run")]
    flags += ["--steps=1", "--inspect=1", "--schedule=constant"]
    done = subprocess.run([*command, *flags, "--parallel", way], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read(inspected, 1), read(tmp_path / "run", 1)
    assert two["gradients"] == pytest.approx(one["gradients"], rel=1e-3)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-6)
    for (a, first), (b, second) in zip(all_answers(one), all_answers(two)):
        assert (a["path"], a["perturbation"], first["text"]) == (b["path"], b["perturbation"], second["text"])
        assert second["before"] == pytest.approx(first["before"], rel=1e-4)
        assert second["tokens"]["ratio"] == pytest.approx(first["tokens"]["ratio"], rel=1e-2)
    pages = [Page(folder / "inspect" / "step_000001.html") for folder in (inspected, tmp_path / "run")]
    assert [image["src"] for image in pages[0].of("img")] == [image["src"] for image in pages[1].of("img")]
    check(pages[1])
    check_numbers(two, pages[1], WEIGHTS, json.loads((tmp_path / "run" / "config.json").read_text()))


# ---- the numbers, in plain Python


def test_loss_and_signals_follow_from_the_tokens(found):
    """From ratio, reference and KL of each token: with three passes the ratio is not 1, and the clip acts."""
    policy, divergence, ratios, clipped = 0.0, 0.0, [], {-1: 0, 0: 0, 1: 0}
    for _, answer in all_answers(found):
        tokens, A = answer["tokens"], answer["advantage"]
        T = len(tokens["ids"])
        if "�" not in answer["text"]:
            assert "".join(tokens["text"]).removesuffix("<|im_end|>") == answer["text"]
        assert answer["before"] == pytest.approx(sum(tokens["before"])) and all(x <= 0 for x in tokens["before"])
        assert answer["after"] == pytest.approx(sum(tokens["after"]))
        for t in range(T):
            ratio, weight, reference = tokens["ratio"][t], 1 / (N * G * T), tokens["reference"][t]
            log_p = tokens["before"][t] + math.log(ratio)

            def policy_part(log_p, t=t, A=A, tokens=tokens):
                rho = math.exp(log_p - tokens["before"][t])
                return -min(rho * A, min(max(rho, 0.8), 1.2) * A) / (N * G * len(tokens["ids"]))

            def kl_part(log_p, reference=reference, weight=weight):
                return 0.04 * weight * (math.exp(reference - log_p) - (reference - log_p) - 1)

            clip = (ratio > 1.2 and A > 0) - (ratio < 0.8 and A < 0)
            assert tokens["clipped"][t] == clip and tokens["weight"][t] == pytest.approx(weight)
            assert 0.04 * weight * tokens["kl"][t] == pytest.approx(kl_part(log_p), rel=1e-2, abs=1e-8)
            slopes = [(part(log_p - 1e-6) - part(log_p + 1e-6)) / 2e-6 for part in (policy_part, kl_part)]
            assert tokens["policy_signal"][t] == pytest.approx(slopes[0], rel=1e-3, abs=1e-7)
            assert tokens["kl_signal"][t] == pytest.approx(slopes[1], rel=1e-3, abs=1e-6)
            assert tokens["signal"][t] == pytest.approx(sum(slopes) * (1 - math.exp(log_p)), rel=1e-2, abs=1e-6)
            policy, divergence = policy + policy_part(log_p), divergence + kl_part(log_p)
            ratios.append(ratio)
            clipped[clip] += 1
    loss, metrics = found["loss"], found["metrics"]
    assert loss["policy"] == pytest.approx(policy, rel=1e-4, abs=1e-6)
    assert loss["kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert loss["policy"] + loss["kl"] == pytest.approx(loss["total"], abs=1e-6) and loss["total"] == metrics["loss"]
    assert metrics["tokens"] == len(ratios) and metrics["ratio"] == pytest.approx(statistics.mean(ratios))
    for name, k in (("clipped_low", -1), ("clipped_high", 1)):
        assert metrics[name] * len(ratios) == pytest.approx(clipped[k])


def test_it_is_the_step_of_the_logs(inspected, found):
    (row,) = [row for row in lines(inspected / "metrics.jsonl") if row["step"] == found["step"]]
    assert found["metrics"] == {name: row[name] for name in found["metrics"]}
    rows = [row for row in lines(inspected / "rollouts.jsonl") if row["step"] == found["step"]]
    assert len(rows) == N * G
    for logged, (video, answer) in zip(rows, all_answers(found)):
        assert (logged["video"], logged["mos"]) == (video["path"], video["target"])
        for name in ("text", "score", "unparsed", "rewards", "reward", "advantage"):
            assert logged[name] == answer[name]
    norms = found["gradients"]
    assert set(norms) == set(PARTS) and found["metrics"]["grad_norm"] > 0.01, "it was clipped"
    assert math.sqrt(sum(x * x for x in norms.values())) == pytest.approx(found["metrics"]["grad_norm"], rel=1e-4)


def inspect_one(policy, config, monkeypatch, reference=None):
    """What is found in one update of a small policy, by SGD; the batch, and the policy before."""
    videos, groups, advantages = rollouts(policy, N, G, 5)
    config = replace(config, videos_per_step=N, group_size=G, max_new_tokens=7, micro_batch=3, inspect="1")
    batch, before, seen = freeze(videos, groups, advantages, policy, reference, config), copy.deepcopy(policy), []
    monkeypatch.setattr(inspect, "write_inspection", lambda folder, found: seen.append(found))
    parts = {name: policy.part(name) for name in PARTS if name != "motion"}
    inspector = Inspector(Path(), config, policy, sgd(policy), parts, lambda ids: str(ids[0]), "")
    with inspector.watching(1) as made:
        metrics = update(policy, inspector.optimizer, batch, 0.004, config, Phases())
    row = {"text": "", "score": None, "unparsed": "empty", "rewards": {}, "reward": 0.0}
    rows = [{**row, "advantage": A} for A in advantages.flatten().tolist()]
    inspector.write(1, batch, made, [{"path": str(n)} for n in range(N)], rows, metrics | {"lr": 0.004})
    return seen[0], batch, before


def test_norms_are_of_the_gradient_before_it_is_clipped(monkeypatch):
    policy = tiny_policy()
    found, *_ = inspect_one(policy, Config(beta=0, grad_clip=1e-3), monkeypatch)
    other = tiny_policy()
    inspect_one(other, Config(beta=0, grad_clip=1e9), monkeypatch)
    prefixes = {"vision": "model.model.vision_tower", "projector": "model.model.multi_modal_projector"}
    squares = dict.fromkeys(found["gradients"], 0.0)
    for name, gradient in gradients(other).items():
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), "language")
        squares[part] += gradient.double().square().sum().item()
    assert found["gradients"] == pytest.approx({part: x**0.5 for part, x in squares.items()}, rel=1e-4)
    assert all(norm > 1e-3 for norm in found["gradients"].values())


def test_probabilities_are_those_before_and_after_the_update(monkeypatch):
    policy = tiny_policy()
    found, batch, before = inspect_one(policy, Config(beta=0, inner_epochs=2, grad_clip=1e9), monkeypatch)
    moved = 0.0
    for n, video in enumerate(found["videos"]):
        for g, answer in enumerate(video["answers"]):
            ids = batch.ids[n : n + 1, g : g + 1][batch.mask[n : n + 1, g : g + 1]][None, None]
            for name, network in (("before", before), ("after", policy)):
                with torch.no_grad():
                    expected = network(batch.videos[n : n + 1], ids).logprobs[0, 0]
                assert answer["tokens"][name] == pytest.approx(expected.tolist(), abs=1e-4)
            assert answer["tokens"]["ids"] == ids[0, 0].tolist()
            assert answer["tokens"]["text"] == [str(token) for token in answer["tokens"]["ids"]]
            moved += abs(answer["after"] - answer["before"])
            assert "kl" not in answer["tokens"] and "reference" not in answer["tokens"]
    assert moved > 0.1 and found["loss"]["kl"] == 0.0


def test_the_signal_is_the_slope_of_the_loss_by_the_logit(monkeypatch):
    config = Config(temperature=0.7, inner_epochs=2, lr=1.0)
    T, V = 5, 11
    batch = inspect_one(tiny_policy(temperature=0.7), config, monkeypatch)[1]
    logits = torch.randn(N, G, T, V, generator=generator(0)).requires_grad_()
    ids = torch.randint(V, (N, G, T, 1), generator=generator(1))
    logprobs = (logits / 0.7).log_softmax(-1).gather(-1, ids)[..., 0]
    old, reference = (logprobs.detach() + 0.2 * torch.randn(N, G, T, generator=generator(k)) for k in (2, 3))
    batch = replace(batch, old_logprobs=old, reference_logprobs=reference)
    options = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.04, "kl": "k3"}
    loss, _ = grpo_loss(logprobs, old, reference, batch.advantages, batch.mask, batch.weights, **options)
    loss.backward()
    found = inspect.token_numbers(batch, logprobs.detach(), logprobs.detach(), config)
    slopes = -logits.grad.gather(-1, ids)[..., 0]
    torch.testing.assert_close(found["signal"], slopes, rtol=1e-4, atol=1e-8)
    assert slopes.abs().max() > 1e-3
    ratio, A = (logprobs - old).exp(), batch.advantages
    clipped = {
        1: [p for p in batch.mask.nonzero().tolist() if ratio[tuple(p)] > 1.2 and A[tuple(p[:2])] > 0],
        -1: [p for p in batch.mask.nonzero().tolist() if ratio[tuple(p)] < 0.8 and A[tuple(p[:2])] < 0],
    }
    for side, places in clipped.items():
        assert places and ((found["clipped"] == side) & batch.mask).nonzero().tolist() == places
        assert all(found["policy_signal"][tuple(place)] == 0 for place in places)


def test_frozen_parts_have_no_gradient(monkeypatch):
    policy = tiny_policy()
    policy.freeze(["vision"])
    found, *_ = inspect_one(policy, Config(beta=0), monkeypatch)
    assert found["gradients"]["vision"] is None and found["gradients"]["projector"] > 0


def test_repeats_are_counted():
    result = doctest.testmod(inspect)
    assert result.attempted > 0 and result.failed == 0
    assert counted_repeats("<a><b><b><b>x</b><a> y <a>") == "<a><b> × 3x</b><a> y <a>"
    assert counted_repeats("") == ""


def test_numbers_that_are_not_finite_are_told(monkeypatch, inspected, tmp_path):
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[3] = torch.nan
    one, *_ = inspect_one(policy, Config(beta=0), monkeypatch)
    assert set(one["gradients"].values()) == {None} and one["metrics"]["skipped"] == 1
    assert one["loss"] == {"policy": "nan", "kl": 0.0, "total": None}
    whole = read(inspected, 3)
    bad = one["videos"][0]["answers"][0]
    assert set(bad["tokens"]["before"]) == {"nan"} and bad["before"] == bad["after"] == "nan"
    tokens = {**whole["videos"][0]["answers"][0]["tokens"], **bad["tokens"]}
    tokens = {name: values[: len(bad["tokens"]["ids"])] for name, values in tokens.items()}
    whole["videos"][0]["answers"][0] |= {"tokens": tokens, "before": "nan", "after": "nan"}
    monkeypatch.undo()
    page = written_page({**whole, **{name: one[name] for name in ("gradients", "metrics", "loss")}}, tmp_path)
    assert tables(page)["Norm of the gradient"][1] == ["vision", "–"]
    assert "Loss or gradient was not finite: 1 of 3 optimizer steps were left out." in page.texts("strong")


def test_tokens_that_make_up_one_character_show_it_once():
    def ids(text):
        return tokenizer()(text, add_special_tokens=False).input_ids

    decode = tokenizer().decode
    for text in ("blurry", "模糊 x", "é🙂é", ""):
        shown = pieces(ids(text), decode)
        assert "".join(shown) == text and len(shown) == len(ids(text)) and all("\ufffd" not in piece for piece in shown)
    smile = ids("🙂")
    assert pieces(smile, decode) == [""] * (len(smile) - 1) + ["🙂"] and len(smile) > 1
    assert pieces([*smile[:-1], *ids("ab")], decode) == ["\ufffd"] * (len(smile) - 1) + ids_as_text("ab")
    assert pieces(smile[:-1], decode) == ["\ufffd"] * (len(smile) - 1)  # cut off in the middle


def ids_as_text(text):
    return [tokenizer().decode([token]) for token in tokenizer()(text, add_special_tokens=False).input_ids]
