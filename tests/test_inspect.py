"""--inspect: the numbers of a step against plain arithmetic, the page against the numbers, and no trace in the run."""

import copy
import doctest
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train
from data import synthetic
from grpo import inspect
from grpo.config import Config, parse_config
from grpo.inspect import Inspector, counted_repeats
from grpo.inspect_page import write_inspection
from grpo.loss import grpo_loss
from grpo.runlog import Phases
from grpo.update import freeze, update
from models.policy import PARTS
from rewards.format import well_formed
from rewards.parse import parse_answer
from tests.helpers import generator, gradients, rollouts, sgd, tiny_policy
from tests.pages import Page, check, chromium, console, tables

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "\"><img src=x onerror=alert(1)>'&amp;{{ 7 * 7 }}</span>"
N, G = 4, 3
SMALL = f"--steps 3 --videos-per-step {N} --group-size {G} --workers 0 --eval-every 0 --micro-batch 3 --save-every 2"
FLAGS = shlex.split(f"{SMALL} --inner-epochs 3 --lr 2e-4 --warmup-steps 0 --grad-clip 0.01 --rewards "
                    "regression=2,ranking,temporal=0.5,format")  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    labels = synthetic.write_clips(folder, {"train": 9, "test": 3}, seed=11)
    return ["--labels", str(labels), "--videos", str(folder)]


def run(clips, output, *flags):
    assert train.main(parse_config([*FLAGS, *clips, "--output", str(output), *flags])) == 0
    return output


@pytest.fixture(scope="module")
def inspected(clips, tmp_path_factory):
    return run(clips, tmp_path_factory.mktemp("runs") / "inspected", "--inspect", "3,1")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(output, step):
    return json.loads((output / "inspect" / f"step_{step:06d}.json").read_text())


@pytest.fixture(scope="module", params=[1, 3])
def found(inspected, request):
    return read(inspected, request.param)


def all_answers(found):
    return [(video, answer) for video in found["videos"] for answer in video["answers"]]


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
    flags = [*FLAGS, *clips, "--output", str(tmp_path / "run"), "--steps", "1", "--inspect", "1", "--schedule=constant"]
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


# ---- the numbers, in plain Python


def spread(values):
    return statistics.variance(values) if len(values) > 1 else 0.0


def scores_of(answers):
    return [read.score for read in (parse_answer(answer["text"]) for answer in answers) if read.score is not None]


def base_rewards(text, siblings, place, videos):
    """Regression and ranking of an answer, from their definitions."""
    read, target = parse_answer(text), videos[place]["target"]
    score = read.score
    if score is None:
        return {"regression": 0.0, "ranking": 0.0}
    fidelities = []
    for other in videos[:place] + videos[place + 1 :]:
        theirs = scores_of(other["answers"])
        if theirs:
            variance = max(0.04, spread(scores_of(siblings)) + spread(theirs))
            win = (1 + math.erf((score - statistics.mean(theirs)) / math.sqrt(2 * variance))) / 2
            truth = 0.5 + 0.5 * ((target > other["target"]) - (target < other["target"]))
            fidelities.append(math.sqrt(win * truth + 1e-6) + math.sqrt((1 - win) * (1 - truth) + 1e-6))
    bell = math.exp(-((score - target) ** 2) / (2 * 0.5**2)) * (0.8 if read.decimals < 2 else 1)
    return {"regression": bell, "ranking": statistics.mean(fidelities)}


def test_rewards_and_advantages_follow_from_texts_and_mos(found):
    videos = found["videos"]
    for place, video in enumerate(videos):
        answers, copies = video["answers"], video["perturbed_answers"]
        own = [base_rewards(answer["text"], answers, place, videos) for answer in answers]
        worse = [base_rewards(copy["text"], copies, place, videos) for copy in copies]
        assert [copy["terms"] for copy in copies] == [pytest.approx(values, abs=1e-4) for values in worse]
        bonus = [0.0] * G
        for name, threshold in (("ranking", 0.5), ("regression", 0.9)):
            means = [statistics.mean(values[name] for values in group) for group in (own, worse)]
            if video["perturbation"] and means[0] > means[1] + 1e-6:
                bonus = [b + 0.3 * (values[name] > threshold) for b, values in zip(bonus, own)]
        for answer, values, extra in zip(answers, own, bonus):
            formed = float(well_formed(answer["text"]))
            assert answer["rewards"] == pytest.approx({**values, "temporal": extra, "format": formed}, abs=1e-4)
            total = 2 * values["regression"] + values["ranking"] + extra / 2 + formed
            assert answer["reward"] == pytest.approx(total, abs=1e-4)
        rewards = [answer["reward"] for answer in answers]
        group = {"mean": statistics.mean(rewards), "std": statistics.stdev(rewards)}
        assert video["group"] == pytest.approx(group, abs=1e-5)
        for answer in answers:
            expected = (answer["reward"] - group["mean"]) / (group["std"] + 1e-4)
            assert answer["advantage"] == pytest.approx(expected, abs=1e-3)


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


# ---- the page


@pytest.fixture(scope="module")
def page(inspected):
    page = Page(inspected / "inspect" / "step_000003.html")
    check(page)
    return page


def test_numbers_on_the_page_are_those_of_the_json(inspected, page):
    found, shown = read(inspected, 3), tables(page)
    names = ["regression", "ranking", "temporal", "format"]
    for video in found["videos"]:
        rows = shown[f"Answers to {video['path']}"]
        assert rows[0][2:8] == [*names, "reward", "advantage"]
        for g, answer in enumerate(video["answers"], 1):
            rewards = [f"{answer['rewards'][name]:.3f}" for name in names]
            times = math.exp(answer["after"] - answer["before"])
            sums = [f"{x:.3f}" for x in (answer["before"], answer["after"], times)]
            score = answer["unparsed"] if answer["score"] is None else f"{answer['score']:.2f}"
            totals = [f"{answer['reward']:.3f}", f"{answer['advantage']:+.3f}"]
            assert rows[g] == [str(g), score, *rewards, *totals, *sums]
            table = shown[f"Tokens of answer {g} to {video['path']}"]
            tokens = answer["tokens"]
            assert [row[1] for row in table[1:]] == [f"{x:.3f}" for x in tokens["before"]]
            assert [row[4] for row in table[1:]] == [f"{x:.4f}" for x in tokens["ratio"]]
            assert [row[6] for row in table[1:]] == [{-1: "low", 0: "", 1: "high"}[x] for x in tokens["clipped"]]
            assert [float(row[9]) for row in table[1:]] == pytest.approx(tokens["signal"], rel=1e-3)
        ranking = shown[f"Ranking of {video['path']}"]
        for row, other in zip(ranking[1:], video["terms"]["ranking"]["opponents"]):
            assert row[0] == found["videos"][other["video"]]["path"] != video["path"]
            pairs = zip(other["win"], other["fidelity"])
            assert row[4:] == ["– (–)" if win is None else f"{win:.2f} ({fidelity:.2f})" for win, fidelity in pairs]
        temporal = shown[f"Temporal comparison of {video['path']}"]
        for row, (name, base) in zip(temporal[1:], video["terms"]["temporal"]["bases"].items()):
            won = base["raw"] > base["perturbed"] + 1e-6 and video["perturbation"] is not None
            assert row[:4] == [name, f"{base['raw']:.3f}", f"{base['perturbed']:.3f}", "yes" if won else "no"]
    loss = dict(shown["The loss in its parts"][1:])
    assert {name: float(x) for name, x in loss.items()} == pytest.approx(
        {"policy": found["loss"]["policy"], "KL": found["loss"]["kl"], "loss": found["loss"]["total"]}, rel=1e-3
    )
    norms = {name: float(x) for name, x in shown["Norm of the gradient"][1:]}
    assert norms == pytest.approx({**found["gradients"], "all": found["metrics"]["grad_norm"]}, rel=1e-3)
    changes = shown["Did good answers become likelier?"]
    good = [answer for _, answer in all_answers(found) if answer["advantage"] > 0]
    likelier = sum(answer["after"] > answer["before"] for answer in good)
    assert changes[1][:3] == ["above 0", str(len(good)), str(likelier)]
    assert sum(int(row[1]) for row in changes[1:]) == N * G


def test_tokens_are_coloured_by_their_numbers(inspected, page):
    found = read(inspected, 3)
    spans = [(attributes["class"].split(), text) for attributes, text in page.elements["span"] if "class" in attributes]
    legend, shown = 6 + 7 + 6 + 7 + 7, iter(spans)
    for _ in range(legend):
        next(shown)
    signals = [x for _, answer in all_answers(found) for x in answer["tokens"]["signal"]]
    most, seen = max(map(abs, signals)), set()
    around = [0.8, 0.9, 0.99, 1.01, 1.1, 1.2]
    for _, answer in all_answers(found):
        tokens = answer["tokens"]
        for t, text in enumerate(tokens["text"]):
            classes, piece = next(shown)
            change = math.exp(tokens["after"][t] - tokens["before"][t])
            levels = {
                "probability": (math.exp(tokens["before"][t]), [0.05, 0.2, 0.5, 0.9, 0.99]),
                "ratio": (tokens["ratio"][t], around),
                "kl": (tokens["kl"][t], [1e-6, 1e-3, 1e-2, 0.1, 1]),
                "signal": (tokens["signal"][t] / most, [-0.5, -0.2, -0.02, 0.02, 0.2, 0.5]),
                "change": (change, around),
            }
            expected = [f"{name}-{sum(value >= b for b in bounds)}" for name, (value, bounds) in levels.items()]
            assert classes == expected + ["clipped"] * bool(tokens["clipped"][t])
            assert piece == text.strip()
            seen |= set(expected)
    assert next(shown, None) is None and len(seen) > 9 and {"signal-0", "signal-6"} & seen
    (style,) = page.texts("style")
    for name in seen:
        view = name.split("-")[0]
        assert f":root:has(#by-{view}:checked) .{name} {{ background: color-mix(" in style
    inputs = page.of("input")
    assert [x["id"] for x in inputs] == [f"by-{view}" for view in ("probability", "ratio", "kl", "signal", "change")]
    assert {(x["type"], x["name"]) for x in inputs} == {("radio", "view")} and sum("checked" in x for x in inputs) == 1
    assert len(page.texts("label")) == len(page.texts("legend")) + 4 == 5


def test_the_bell_is_drawn_around_the_mos_with_the_answers_on_it(inspected, page):
    found = read(inspected, 3)
    drawings = page.source.split("<svg")[1:]
    assert len(drawings) == N
    for video, drawing in zip(found["videos"], drawings):
        points = re.search(r'class="line stroke-0" stroke-dasharray="none" d="M([^"]+)"', drawing)[1].split("L")
        points = [tuple(map(float, point.split())) for point in points]
        assert all(b[0] > a[0] for a, b in pairwise(points))
        for x, y in points:
            score, reward = 1 + (x - 60) / (350 - 60) * 4, (208 - y) / (208 - 10)
            assert reward == pytest.approx(math.exp(-((score - video["target"]) ** 2) / 0.5), abs=0.01)
        dots = re.findall(r'class="dot stroke-1" d="M([\d.]+) ([\d.]+)h0"', drawing)
        places = [(1 + (float(x) - 60) / 290 * 4, (208 - float(y)) / 198) for x, y in dots]
        answers = [(answer["score"], answer["rewards"]["regression"]) for answer in video["answers"]]
        assert places == [pytest.approx(answer, abs=0.01) for answer in answers if answer[0] is not None]


def test_frames_of_video_and_copy_are_shown(inspected, page):
    found = read(inspected, 3)
    alts = [image["alt"] for image in page.of("img")]
    expected = []
    for video in found["videos"]:
        for title in [video["path"], f"the copy of {video['path']}"]:
            expected += [f"frame {k} of 6 of {title}" for k in range(1, 7)]
    assert alts == expected
    sources = [image["src"] for image in page.of("img")]
    for k, video in enumerate(found["videos"]):
        frames, copies = sources[12 * k : 12 * k + 6], sources[12 * k + 6 : 12 * k + 12]
        assert frames != copies and video["perturbation"] in page.texts("strong")
        if video["perturbation"] == "reverse":
            assert copies == frames[::-1]


def without_pictures(found):
    none = {"thumbnails": [], "of": 0}
    videos = [video | {"pictures": {"frames": none, "perturbed": none}} for video in found["videos"]]
    return {**found, "videos": videos}


def written_page(found, folder):
    write_inspection(folder, without_pictures(found))
    page = Page(folder / f"step_{found['step']:06d}.html")
    check(page)
    return page


def test_text_from_outside_stays_text(inspected, tmp_path):
    found = read(inspected, 3)
    video = found["videos"][0]
    video["path"] = found["prompt"] = HOSTILE
    for answer in [*video["answers"], *video["perturbed_answers"]]:
        answer["text"] = HOSTILE
    video["answers"][0]["tokens"]["text"][0] = HOSTILE
    page = written_page(found, tmp_path)
    assert page.of("img") == [] and page.texts("blockquote") == [HOSTILE] and HOSTILE in page.texts("span")
    assert HOSTILE in page.texts("h2") and json.loads((tmp_path / "step_000003.json").read_text())["prompt"] == HOSTILE


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


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_a_browser_shows_another_colouring_for_another_choice(inspected, tmp_path):
    source = (inspected / "inspect" / "step_000003.html").read_text(encoding="utf-8")
    source = source.replace(
        "</style>", ".views, header, figure, .scroll, dl, details, .note { display: none; }</style>"
    )
    pictures = []  # of the tokens, without the choice itself
    for view in ("probability", "signal"):
        chosen = source.replace(" checked>", ">").replace(f'id="by-{view}">', f'id="by-{view}" checked>')
        (tmp_path / "page.html").write_text(chosen, encoding="utf-8")
        said, picture = console(tmp_path / "page.html", tmp_path)
        assert said == []
        pictures.append(picture)
    assert pictures[0] != pictures[1]
