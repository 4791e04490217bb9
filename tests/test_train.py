"""train.py as its users run it: files, numbers, wrong input, several processes, resuming."""

import dataclasses
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from data import synthetic
from data.dataset import Batch
from data.labels import MAPPINGS, read_labels
from data.prompts import PROMPTS
from data.samplers import SAMPLERS
from grpo.checkpoint import damage, read_state, step_folders
from grpo.config import Config, parse_config
from grpo.results import read_predictions
from grpo.runlog import JsonLines
from models import footprint
from models.internvl import VQAThinkerModel, load_vqathinker
from models.loading import ATTENTION, PRECISIONS, load_policy, save_policy
from tests.helpers import motion_policy, relative

ROOT = Path(__file__).resolve().parents[1]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
SMALL = shlex.split("--steps 2 --videos-per-step 4 --group-size 3 --max-new-tokens 48 --workers 0 --eval-every 2")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Flags naming a small set of clips."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    labels = synthetic.write_clips(folder, {"train": 9, "val": 4, "test": 5}, seed=11)
    return ["--labels", str(labels), "--videos", str(folder)]


def run(clips, output, *flags):
    """A run in this process; returns its folder."""
    assert train.main(parse_config([*SMALL, *clips, "--output", str(output), *flags])) == 0
    return Path(output)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shell(*command, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def scored(capsys, model, video, *flags):
    """What `evaluate.py --video --json` prints."""
    capsys.readouterr()
    evaluate.main(evaluate.parse_arguments(["--model", str(model), "--video", str(video), "--json", *flags]))
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    return run(clips, tmp_path_factory.mktemp("runs") / "full")


def test_a_run_leaves_the_files_and_fields_that_scripts_rely_on(finished):
    metrics = lines(finished / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert {
            "loss",
            "kl",
            "lr",
            "grad_norm",
            "entropy",
            "clipped_low",
            "clipped_high",
            "zero_variance",
        } <= row.keys()
        assert {
            "unparsed",
            "length",
            "truncated",
            "tokens_per_s",
            "peak_memory_mib",
            "phase_s",
            "advantage",
        } <= row.keys()
        assert set(row["rewards"]) == {"regression", "ranking", "temporal", "format"}
        assert all(set(value) == {"mean", "std"} for value in row["rewards"].values())
    assert metrics[0]["kl"] == 0.0 and metrics[0]["ratio"] == pytest.approx(1, abs=1e-12)
    assert metrics[1]["kl"] > 0
    assert metrics[0]["val"] is None and metrics[1]["val"]["listed"] == 4

    summary = json.loads((finished / "summary.json").read_text())
    assert {"srcc", "plcc"} <= summary["before"].keys() & summary["after"].keys()
    assert summary["train_seconds"] > 0 and summary["command"] and "torch" in summary["versions"]
    assert json.loads((finished / "config.json").read_text())["group_size"] == 3
    load_policy(str(finished / "checkpoints" / "step_000002"))


def test_the_scores_of_the_last_measurement_are_written_down(finished, clips):
    rows = read_predictions(finished / "predictions.csv")
    labelled = [row for row in lines(Path(clips[1])) if row["split"] == "test"]
    assert [row["path"] for row in rows] == [row["path"] for row in labelled] and len(rows) == 5
    assert [row["target"] for row in rows] == pytest.approx(
        [clip.target for clip in read_labels(clips[1], "test")], abs=5e-5
    )
    after = json.loads((finished / "summary.json").read_text())["after"]
    errors = [row["score"] - row["target"] for row in rows if row["score"] is not None]
    assert len(errors) == after["scored"] > 0
    assert (sum(error**2 for error in errors) / len(errors)) ** 0.5 == pytest.approx(after["rmse"], abs=1e-4)


def test_every_answer_is_written_down_and_its_numbers_agree(finished):
    rows = lines(finished / "rollouts.jsonl")
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        assert {"step", "video", "text", "score", "rewards", "reward", "advantage"} <= row.keys()
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()), abs=1e-5)
        assert (row["score"] is None) == (row["unparsed"] is not None)
    for start in range(0, len(rows), 3):
        group = rows[start : start + 3]
        assert len({(row["step"], row["video"]) for row in group}) == 1
        rewards = torch.tensor([row["reward"] for row in group], dtype=torch.float64)
        advantages = torch.tensor([row["advantage"] for row in group], dtype=torch.float64)
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4) if rewards.std() > 1e-6 else 0 * rewards
        torch.testing.assert_close(advantages, expected, atol=1e-3, rtol=1e-3)
    metrics = lines(finished / "metrics.jsonl")[0]
    first = [row for row in rows if row["step"] == 1]
    for name, value in metrics["rewards"].items():
        assert value["mean"] == pytest.approx(sum(row["rewards"][name] for row in first) / len(first), abs=1e-5)


def test_terms_do_not_depend_on_order_or_on_the_other_terms(clips, finished, tmp_path):
    """The first step's answers come from the same policy, so every term kept must have the same value."""
    first = {name: [row["rewards"][name] for row in lines(finished / "rollouts.jsonl") if row["step"] == 1]
             for name in ("regression", "ranking", "temporal", "format")}  # fmt: skip
    for spec in ("format,temporal,ranking,regression", "format=0.5,regression", "ranking"):
        rows = lines(run(clips, tmp_path / spec, "--rewards", spec, "--steps", "1") / "rollouts.jsonl")
        for name in rows[0]["rewards"]:
            assert [row["rewards"][name] for row in rows] == pytest.approx(first[name], abs=1e-6), (spec, name)


def test_micro_batches_change_nothing(clips, finished, tmp_path):
    split = run(clips, tmp_path / "split", "--micro-batch", "1")
    for one, other in zip(lines(finished / "metrics.jsonl"), lines(split / "metrics.jsonl")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    texts = [[row["text"] for row in lines(path / "rollouts.jsonl")] for path in (finished, split)]
    assert texts[0] == texts[1]


def test_slow_lines_are_there_before_each_checkpoint_and_after_an_interrupt(clips, tmp_path, monkeypatch):
    def steps_of(name):
        return {row["step"] for row in lines(tmp_path / "run" / f"{name}.jsonl")}

    def save_checkpoint(run, state, *_):
        saved.append(state["step"])
        assert steps_of("metrics") == steps_of("rollouts") == set(range(1, state["step"] + 1))

    def better(validation, best):
        if len(saved) == 2:
            raise KeyboardInterrupt

    saved, append = [], JsonLines._append
    monkeypatch.setattr(JsonLines, "_append", lambda *call: (time.sleep(0.5), append(*call)))
    monkeypatch.setattr(train.checkpoint, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(train, "better", better)
    with pytest.raises(KeyboardInterrupt):
        run(clips, tmp_path / "run", "--steps", "4", "--save-every", "1", "--eval-every", "0")
    assert saved == [1, 2] and steps_of("metrics") == {1, 2} and steps_of("rollouts") == {1, 2, 3}


def test_a_bfloat16_run_resumes_with_the_masters_it_had(clips, tmp_path, capsys):
    flags = ("--precision", "bfloat16", "--save-every", "1", "--lr", "1e-6")
    whole, half = run(clips, tmp_path / "whole", *flags), run(clips, tmp_path / "half", *flags)
    shutil.rmtree(half / "checkpoints" / "step_000002")
    run(clips, half, *flags, "--resume", "auto")
    states = []
    for output in (whole, half):
        folder = output / "checkpoints" / "step_000002"
        saved = load_file(folder / "model.safetensors")
        masters = torch.load(folder / "optimizer.pt", weights_only=True)["masters"]
        trained = {name: value for name, value in saved.items() if "slowfast" not in name}
        assert {value.dtype for value in trained.values()} == {torch.bfloat16} and len(masters) == len(trained)
        assert any(not torch.equal(master, master.bfloat16().float()) for master in masters)
        states.append([*saved.values(), *masters])
    for one, other in zip(*states):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    shutil.rmtree(half / "checkpoints" / "step_000002")
    files = [half / "metrics.jsonl", half / "config.json"]
    before = [file.read_text() for file in files]
    capsys.readouterr()
    for other, reason in (("--precision=float32", "--precision: "), ("--freeze=vision", "parameter group")):
        arguments = [*SMALL, *clips, "--output", str(half), *flags, "--resume", "auto", other]
        arguments += ["--allow-changed", "precision,freeze"]
        assert train.main(parse_config(arguments)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"train.py: error: --resume {half / 'checkpoints' / 'step_000001'}: ") and reason in line
    assert [file.read_text() for file in files] == before


def test_torchrun_with_two_processes_computes_what_one_does(clips, finished, tmp_path):
    done = shell(*TWO, *SMALL, *clips, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SRCC" in done.stdout and " evaluate.py --model " in done.stdout
    one, two = lines(finished / "rollouts.jsonl"), lines(tmp_path / "two" / "rollouts.jsonl")
    assert [(row["video"], row["text"]) for row in one] == [(row["video"], row["text"]) for row in two]
    for a, b in zip(one, two):
        assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-4)
    for a, b in zip(lines(finished / "metrics.jsonl"), lines(tmp_path / "two" / "metrics.jsonl")):
        for name in ("loss", "grad_norm", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    before = [json.loads((path / "summary.json").read_text())["before"] for path in (finished, tmp_path / "two")]
    assert before[0].pop("undefined") == before[1].pop("undefined")
    assert before[0] == pytest.approx(before[1])


def test_torchrun_with_all_shared_goes_on_with_the_optimizer_shared(clips, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    output = tmp_path / "run"
    for way in (["--parallel", "fsdp"], ["--shard-optimizer", "--resume", "auto"]):
        done = shell(*command, *SMALL, *clips, "--output", str(output), "--save-every", "1", *way)
        assert done.returncode == 0, done.stderr[-3000:]
        one, two = lines(finished / "rollouts.jsonl"), lines(output / "rollouts.jsonl")
        assert [(row["step"], row["video"], row["text"]) for row in one] == [
            (row["step"], row["video"], row["text"]) for row in two
        ]
        for a, b in zip(lines(finished / "metrics.jsonl"), lines(output / "metrics.jsonl")):
            for name in ("loss", "grad_norm", "entropy"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
        for folder in ("best", "checkpoints/step_000002"):
            one, two = (load_file(path / folder / "model.safetensors") for path in (finished, output))
            assert one.keys() == two.keys()
            for name, value in one.items():
                other = two[name]
                assert other.dtype == value.dtype and (torch.equal(other, value) or relative(other, value) < 1e-2), name
            assert json.loads((output / folder / "config.json").read_text()) == json.loads(
                (finished / folder / "config.json").read_text()
            )
        shutil.rmtree(output / "checkpoints" / "step_000002")


def test_help_is_quick_and_names_every_flag():
    shell(sys.executable, "train.py", "--help")
    start = time.perf_counter()
    done = shell(sys.executable, "train.py", "--help")
    assert time.perf_counter() - start < 3
    assert done.returncode == 0 and "--videos-per-step" in done.stdout and "--temporal-scope" in done.stdout


def refused(capsys, *flags):
    """The one line of a refused run."""
    try:
        code = train.main(parse_config([*SMALL, *flags]))
    except SystemExit as error:  # argparse's own way out
        code = error.code
    assert code == 2
    message = capsys.readouterr().err.strip()
    assert message.splitlines()[-1].startswith("train.py: error: ") and "Traceback" not in message
    return message


WRONG_FLAGS = {
    "--group-size 1": "--group-size",
    "--group-size two": "--group-size",
    "--videos-per-step 1": "--videos-per-step",
    "--videos-per-step 100": "--videos-per-step",
    "--rewards temporal": "ranking",
    "--rewards regresion": "regression",
    "--rewards no_such_module:Reward": "--rewards",
    "--learning-rate 1": "unknown argument --learning-rate",
    "--grup-size 4": "did you mean --group-size",
    "--labels nowhere.jsonl": "nowhere.jsonl",
    "--videos nowhere": "--videos",
    "--model nowhere/at/all": "--model",
    "--resume nowhere": "--resume",
    "--lr nan": "--lr",
    "--preset internvl3-8b --labels x": "--videos",
    "--frame-cache cache --sampler random-segment": "--frame-cache",
    "--val-fraction 0.2": "--val-fraction",
    "--freeze vision,head": "--freeze head",
    "--freeze language --lora-rank 8": "--freeze language: goes without --lora-rank",
    "--parallel fsdp --lora-rank 8": "--parallel fsdp: goes without --lora-rank",
    "--lora-alpha 8": "--lora-alpha 8: goes with --lora-rank",
    "--motion none --slowfast x": "--motion none",
    "--motion none --motion-clips 1": "--motion none: goes without --motion-clips",
    "--parallel fsdp --shard-optimizer": "--shard-optimizer: goes with --parallel ddp",
}


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_wrong_flags_are_named_in_one_line(clips, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    given = ["--output", str(tmp_path / "run")] if "preset" in flags else [*clips, "--output", str(tmp_path / "run")]
    message = refused(capsys, *given, *flags.split())
    assert WRONG_FLAGS[flags] in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_wrong_files_are_named_in_one_line(clips, tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    labels, videos = tmp_path / "labels.jsonl", tmp_path / "clips"
    shutil.copytree(clips[3], videos)
    whole = (videos / "labels.jsonl").read_text()
    flags = ["--labels", str(labels), "--videos", str(videos), "--output", str(tmp_path / "run")]

    labels.write_text(
        whole.replace('"mos": ', '"mos": "high", "was": ', 2).replace('"mos": "high", "was": ', '"mos": ', 1)
    )
    assert f"{labels}:2: " in refused(capsys, *flags)
    labels.write_text(whole.replace('"split": "train"', '"split": "other"'))
    assert "no clip with split 'train'" in refused(capsys, *flags)
    labels.write_text(whole)

    (videos / "train" / "00000.mp4").unlink()
    missing = refused(capsys, *flags).splitlines()
    assert missing[0] == "1 of 18 labelled videos are missing, train/00000.mp4 first"
    assert "--videos" in missing[1] and "1 of 9 training videos are missing" in missing[1]
    assert "--max-bad-videos 0.01" in missing[1]

    assert "holds a run already" in refused(capsys, *clips, "--output", str(finished))
    model = tmp_path / "model"
    model.mkdir()
    assert "no config.json" in refused(capsys, *flags, "--model", str(model))
    (model / "config.json").write_text("{}")
    assert "no weights" in refused(capsys, *flags, "--model", str(model))


def test_the_default_output_is_the_next_free_folder(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/tiny-1", "runs/tiny-2"):
        assert train.main(parse_config([*SMALL, *clips, "--steps", "1"])) == 0
        assert (tmp_path / expected / "summary.json").exists()


def save_motion_model(folder, frames):
    """The demo's model with a new motion token from a small SlowFast set for so many frames, instead of its own."""
    policy = load_policy(Config().model, motion="none")
    save_policy(policy, folder.with_name("internvl"))
    slowfast = motion_policy(frames=frames).model.model.slowfast
    with pytest.warns(UserWarning, match="the motion projector is new"):
        policy.model = load_vqathinker(folder.with_name("internvl"), slowfast, attn_implementation=ATTENTION)
    save_policy(policy, folder)


def test_a_model_with_a_motion_token_is_trained_resumed_and_scored(clips, tmp_path, capsys):
    save_motion_model(tmp_path / "model", frames=6)
    flags = ["--model", str(tmp_path / "model"), "--save-every", "1"]
    output = run(clips, tmp_path / "run", *flags)
    shutil.rmtree(output / "checkpoints" / "step_000002")
    run(clips, output, *flags, "--resume", "auto")
    paths = tmp_path / "model", output / "checkpoints" / "step_000002"
    before, after = (load_policy(str(path), motion="slowfast").model.state_dict() for path in paths)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "model.motion_projector.3.weight" in changed and not any("slowfast" in name for name in changed)
    video = next(Path(clips[3]).glob("test/*.mp4"))
    assert scored(capsys, output / "best", video)["status"] in ("ok", "unparsed")
    plain = run(clips, tmp_path / "plain", *flags, "--motion", "none")
    assert not load_policy(str(plain / "best")).has_motion


def test_a_model_may_see_dense_clips_in_training_resuming_and_scoring(clips, tmp_path, monkeypatch, capsys):
    save_motion_model(tmp_path / "model", frames=2)
    seen, features = [], VQAThinkerModel.motion_features
    monkeypatch.setattr(
        VQAThinkerModel, "motion_features", lambda self, x: seen.append(tuple(x.shape)) or features(self, x)
    )
    flags = ["--model", str(tmp_path / "model"), "--motion-clips", "2", "--save-every", "1"]
    output = run(clips, tmp_path / "run", *flags)
    watched = 5 + 2 * (4 + 4) + 4 + 5  # the test, two steps of videos and copies, the validation, the test again
    assert seen == [(2, 8, 3, 96, 96)] * watched
    whole = lines(output / "rollouts.jsonl")
    shutil.rmtree(output / "checkpoints" / "step_000002")
    run(clips, output, *flags, "--resume", "auto")
    assert lines(output / "rollouts.jsonl") == whole
    for folder in (output / "best", output / "checkpoints" / "step_000002"):
        motion = json.loads((folder / "config.json").read_text())["motion"]
        assert (motion["slow_stride"], motion["temporal_repeat"]) == (4, 1)
        assert json.loads((folder / "recipe.json").read_text())["motion_clips"] == 2

    score = ["--model", str(output / "best"), *clips, "--output"]
    for motion_recipe, shape, k in [([], (2, 8, 3, 96, 96), 2), (["--motion-recipe", "train"], (5, 6, 3, 96, 96), 0)]:
        seen.clear()
        assert evaluate.main(evaluate.parse_arguments([*score, str(tmp_path / f"score{k}"), *motion_recipe])) == 0
        assert set(seen) == {shape}
        metrics = json.loads((tmp_path / f"score{k}" / "metrics.json").read_text())
        assert metrics["recipe"]["motion_clips"] == k
        if k:
            after = json.loads((output / "summary.json").read_text())["after"]
            (figures,) = metrics["datasets"].values()
            assert figures.pop("undefined") == after.pop("undefined")
            assert {name: figures[name] for name in after} == pytest.approx(after)


@pytest.mark.parametrize("perturbed", [False, True])
def test_perturbed_copies_stand_behind_the_videos_with_their_own_dense_clips(perturbed):
    frames, copies = (torch.full((2, 6, 3, 1, 1), value, dtype=torch.uint8) for value in (1, 2))
    clips, other = (torch.full((2, 3, 8, 3, 1, 1), value, dtype=torch.uint8) for value in (3, 4))
    batch = Batch(
        clips=[], frames=frames, perturbed=copies if perturbed else None, perturbed_ok=torch.ones(2), kinds=[],
        targets=torch.ones(2), index=torch.tensor([5, 8]), flags=[], failures=[],
        motion_clips=clips, perturbed_motion_clips=other if perturbed else None,
    )  # fmt: skip
    for given in (batch, dataclasses.replace(batch, motion_clips=None, perturbed_motion_clips=None)):
        videos, uniforms = train.step_inputs(given, torch.zeros(1, 7), 1, Config(), torch.device("cpu"))
        assert len(videos) == len(uniforms) == len(videos.prompt_ids) == (4 if perturbed else 2)
        assert torch.equal(videos.frames, torch.cat([frames, copies] if perturbed else [frames]))
        if given is batch:
            assert torch.equal(videos.motion_clips, torch.cat([clips, other] if perturbed else [clips]))
        else:
            assert videos.motion_clips is None


def test_dense_clips_need_a_motion_token(clips, tmp_path, capsys):
    model = tmp_path / "internvl"
    save_policy(load_policy(Config().model, motion="none"), model)
    flags = [*clips, "--output", str(tmp_path / "run"), "--model", str(model), "--motion-clips", "1"]
    assert f"--motion-clips: --model {model} has no motion token" in refused(capsys, *flags)
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_a_run_is_kept_with_its_model_and_used(clips, tmp_path, capsys):
    flags = ["--image-side", "64", "--system", "You judge videos.", "--frames", "7", "--steps", "1"]
    output = run(clips, tmp_path / "run", *flags)
    recipe = json.loads((output / "best" / "recipe.json").read_text())
    assert (recipe["image_side"], recipe["system"], recipe["frames"]) == (64, "You judge videos.", 7)
    video = next(Path(clips[3]).glob("test/*.mp4"))
    sides = [], ["--image-side", "64"], ["--image-side", "128"]
    told = [scored(capsys, output / "best", video, *side) for side in sides]
    assert told[0] == told[1] != told[2]
    assert "--image-side 65: must be a multiple of 32" in refused(capsys, *clips, "--image-side", "65")


def test_frozen_parts_stay_as_they_were(clips, tmp_path):
    output = run(clips, tmp_path / "run", "--freeze", "vision,projector,motion", "--save-every", "1")
    before, after = (load_policy(name).model.state_dict() for name in (Config().model, str(output / "best")))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("model.language_model.", "lm_head.")) for name in changed)
    shutil.rmtree(output / "checkpoints" / "step_000002")
    run(clips, output, "--freeze", "vision,projector,motion", "--resume", "auto")


# ---- videos that cannot be used


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Flags naming clips of which two are no videos, one is missing, and one of the validation clips is empty."""
    folder = tmp_path_factory.mktemp("damaged") / "clips"
    labels = synthetic.write_clips(folder, {"train": 13, "val": 4, "test": 3}, seed=12)
    for name in ("00002", "00009"):
        (folder / "train" / f"{name}.mp4").write_text("not a video")
    (folder / "train" / "00005.mp4").unlink()
    (folder / "val" / "00001.mp4").write_bytes(b"")
    return ["--labels", str(labels), "--videos", str(folder), "--max-bad-videos", "0.25", "--steps", "6"]


BAD = {"train/00002.mp4": "unreadable", "train/00005.mp4": "missing", "train/00009.mp4": "unreadable"}


@pytest.fixture(scope="module")
def survived(damaged, tmp_path_factory):
    return run(damaged, tmp_path_factory.mktemp("runs") / "survived", "--save-every", "2", "--keep-checkpoints", "9")


def videos_of_steps(output):
    """The videos of each step, in order, each once."""
    steps = {}
    for row in lines(output / "rollouts.jsonl"):
        steps.setdefault(row["step"], {})[row["video"]] = None
    return {step: list(videos) for step, videos in steps.items()}


def test_unreadable_videos_are_replaced_counted_and_listed(survived):
    steps = videos_of_steps(survived)
    assert list(steps) == [1, 2, 3, 4, 5, 6] and all(len(videos) == 4 for videos in steps.values())
    assert not BAD.keys() & {video for videos in steps.values() for video in videos}
    rows = lines(survived / "bad_videos.jsonl")
    assert {row["path"]: row["reason"] for row in rows} == BAD and len(rows) == 3
    counts = [row["bad_videos"] for row in lines(survived / "metrics.jsonl")]
    assert counts == [sum(row["step"] <= step for row in rows) for step in range(1, 7)] and counts[-1] == 3
    assert lines(survived / "metrics.jsonl")[1]["val"]["coverage"] == 0.75


@pytest.fixture(scope="module")
def survived_by_two(damaged, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "two"
    flags = ["--save-every", "2", "--keep-checkpoints", "9", "--output", str(output)]
    done = shell(*TWO, *SMALL, *damaged, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_a_bad_video_on_one_of_two_processes_hangs_neither(damaged, survived, survived_by_two, tmp_path):
    assert videos_of_steps(survived_by_two) == videos_of_steps(survived)
    assert lines(survived_by_two / "bad_videos.jsonl") == lines(survived / "bad_videos.jsonl")
    stopped = shell(*TWO, *SMALL, *damaged, "--max-bad-videos", "0.1", "--output", str(tmp_path / "stopped"))
    assert stopped.returncode != 0 and "2 of 13 training videos cannot be used" in stopped.stderr


def test_too_many_bad_videos_stop_the_run_with_their_list_and_what_was_learned(damaged, survived, tmp_path, capsys):
    output = tmp_path / "run"
    rows = lines(survived / "bad_videos.jsonl")
    third = max(row["step"] for row in rows)
    code = train.main(parse_config([*SMALL, *damaged, "--max-bad-videos", "0.2", "--output", str(output)]))
    said = capsys.readouterr().err
    assert code == 2 and "train.py: error: 3 of 13 training videos cannot be used:" in said
    assert all(f"  {path}: {reason} (" in said for path, reason in BAD.items()) and "--max-bad-videos" in said
    assert (output / "checkpoints" / f"step_{third - 1:06d}").is_dir()
    run(damaged, output, "--resume", "auto")
    assert videos_of_steps(output) == videos_of_steps(survived)


def test_a_place_in_the_step_without_any_readable_video_stops_the_run(clips, tmp_path, capsys):
    videos = tmp_path / "clips"
    shutil.copytree(clips[3], videos)
    (videos / "train" / "00003.mp4").write_text("not a video")
    flags = ["--labels", str(videos / "labels.jsonl"), "--videos", str(videos), "--max-bad-videos", "1"]
    flags += ["--videos-per-step", "9", "--output", str(tmp_path / "run")]
    assert train.main(parse_config([*SMALL, *flags])) == 2
    assert "1 of 9 training videos cannot be used:\n  train/00003.mp4: unreadable (" in capsys.readouterr().err


# ---- runs that are resumed: these have bad videos, replaced ones, and a best model before their last


def left(output):
    """All that a run leaves behind, but for its folder, times, speeds, memory and how it was resumed."""
    found = {name: lines(output / f"{name}.jsonl") for name in ("metrics", "rollouts", "bad_videos")}
    for row in found["metrics"]:
        for name in ("tokens_per_s", "phase_s", "peak_memory_mib"):
            row.pop(name)
    last = step_folders(output)[-1]
    for folder in (last, output / "best"):
        assert damage(folder) is None
        files = json.loads((folder / "manifest.json").read_text())
        found[folder.name] = {name: row for name, row in files.items() if name != "state.json"}  # size and sha256
    state = read_state(last)
    found["state"] = {name: state[name] for name in ("step", "before", "best", "bad_videos", "processes")}
    return {**found, "best state": read_state(output / "best")}


@pytest.mark.parametrize(("stop", "flipped"), [(1, False), (5, True)])
def test_a_run_that_was_stopped_and_resumed_is_one_that_was_not(
    damaged, survived, tmp_path, capsys, monkeypatch, stop, flipped
):
    output, flags, calls, better = tmp_path / "run", ["--save-every", "1"], itertools.count(1), train.better

    def stopping(*values):
        if next(calls) > stop:
            raise KeyboardInterrupt
        return better(*values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "better", stopping)
        run(damaged, output, *flags)
    newest = step_folders(output)[-1]
    assert read_state(newest)["step"] == stop and len(lines(output / "metrics.jsonl")) == stop
    if flipped:
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[-1000] ^= 1
        (newest / "model.safetensors").write_bytes(data)
    capsys.readouterr()
    run(damaged, output, *flags, "--resume", "auto", "--workers", "1")
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert told == [f"{newest} is damaged and passed over: model.safetensors: sha256 differs"] * flipped
    assert left(output) == left(survived)


def back_to(output, step, copy):
    """A copy of a run as if it had been killed behind a step: lines and the best model are ahead of the checkpoint."""
    shutil.copytree(output, copy)
    for folder in step_folders(copy):
        if read_state(folder)["step"] > step:
            shutil.rmtree(folder)
    return copy


def test_two_processes_resume_as_exactly(damaged, survived_by_two, tmp_path):
    output = back_to(survived_by_two, 2, tmp_path / "two")
    done = shell(*TWO, *SMALL, *damaged, "--output", str(output), "--resume", "auto")
    assert done.returncode == 0 and "rounding" not in done.stdout, done.stderr[-3000:]
    assert left(output) == left(survived_by_two)


def test_a_run_of_two_processes_goes_on_with_one_up_to_rounding(damaged, survived_by_two, tmp_path, capsys):
    output = back_to(survived_by_two, 4, tmp_path / "one")
    run(damaged, output, "--resume", "auto")
    assert "resuming: was 2 process(es), is 1: the same results, up to rounding" in capsys.readouterr().out.splitlines()
    assert videos_of_steps(output) == videos_of_steps(survived_by_two)
    one, two = lines(output / "metrics.jsonl"), lines(survived_by_two / "metrics.jsonl")
    assert one[:4] == two[:4]
    for a, b in zip(one[4:], two[4:]):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)
        for name in ("loss", "grad_norm", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_flags_that_change_results_are_refused_on_resume_or_allowed(clips, finished, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "run")
    files = [output / "metrics.jsonl", output / "config.json"]
    before = [file.read_text() for file in files]
    flags = ["--output", str(output), "--resume", "auto", "--steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
        message = refused(capsys, *clips, *flags, "--sigma", "0.4")
        assert "--resume auto: --steps was 2, is 3; --sigma was 0.5, is 0.4: " in message
        assert message.endswith("--allow-changed steps,sigma")
        assert "--sigma was" in refused(capsys, *clips, *flags, "--sigma", "0.4", "--allow-changed", "steps")
    assert [file.read_text() for file in files] == before
    run(clips, output, *flags, "--allow-changed", "steps", "--micro-batch", "2")
    assert "resuming: --micro-batch was 16, is 2: the same results, up to rounding" in capsys.readouterr().out
    assert files[0].read_text().startswith(before[0]) and len(lines(files[0])) == 3


def test_a_checkpoint_goes_on_in_another_folder_whose_best_model_is_its_own(clips, finished, tmp_path):
    checkpoint = finished / "checkpoints" / "step_000002"
    assert read_state(checkpoint)["best"] is not None
    output = run(clips, tmp_path / "other", "--resume", str(checkpoint))
    assert json.loads((output / "summary.json").read_text())["after_step"] == 2
    load_policy(str(output / "best"))


# ---- splits, targets, frames


def test_a_validation_split_is_made_saved_and_kept(clips, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    rows = [row for row in lines(Path(clips[1])) if row["split"] != "val"]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--labels", str(labels), *clips[2:], "--val-fraction", "0.25"]
    output = run(flags, tmp_path / "run", "--seed", "3", "--save-every", "1")
    split = {row["path"]: row["split"] for row in lines(output / "split.jsonl")}
    assert split.keys() == {row["path"] for row in rows}
    assert sorted(split.values()) == sorted(["test"] * 5 + ["val"] * 2 + ["train"] * 7)
    assert {row["video"] for row in lines(output / "rollouts.jsonl")} <= {p for p, s in split.items() if s == "train"}
    assert lines(output / "metrics.jsonl")[-1]["val"]["listed"] == 2

    one, other = (next(path for path in split if split[path] == side) for side in ("val", "train"))
    swapped = {one: other, other: one}  # with each other's opinion scores they would change sides
    rows = [{**row, "path": swapped.get(row["path"], row["path"])} for row in rows]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(output / "checkpoints" / "step_000002")
    run(flags, output, "--seed", "3", "--resume", "auto")
    assert {row["path"]: row["split"] for row in lines(output / "split.jsonl")} == split

    shutil.rmtree(output / "checkpoints" / "step_000002")
    flags[-1] = "0.5"
    run(flags, output, "--seed", "3", "--resume", "auto", "--allow-changed", "val-fraction")
    again = {row["path"]: row["split"] for row in lines(output / "split.jsonl")}
    assert list(again.values()).count("val") in (4, 5) and again.keys() == split.keys()
    assert lines(output / "metrics.jsonl")[-1]["val"]["listed"] == list(again.values()).count("val")


def test_the_target_is_as_mapped_and_the_checkpoint_remembers_it(clips, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    rows = [{**row, "mos": 20 * row["mos"], "mos_range": [0, 100]} for row in lines(Path(clips[1]))]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--labels", str(labels), *clips[2:], "--steps", "1"]
    mos = {row["path"]: row["mos"] for row in rows}
    for mapping, target in {"linear": lambda m: 1 + m / 25, "released": lambda m: m / 20}.items():
        output = run(flags, tmp_path / mapping, "--mos-mapping", mapping)
        for row in lines(output / "rollouts.jsonl"):
            assert row["mos"] == pytest.approx(target(mos[row["video"]]))
        assert json.loads((output / "best" / "recipe.json").read_text())["mos_mapping"] == mapping
    labels.write_text(labels.read_text().replace("[0, 100]", "[1, 100]"))
    assert f"{labels}:1: --mos-mapping released" in refused(capsys, *flags, "--mos-mapping", "released")


def test_a_frame_cache_changes_nothing_but_the_decoding(clips, finished, tmp_path, monkeypatch):
    cache = ["--frame-cache", str(tmp_path / "cache"), "--steps", "2"]
    first = run(clips, tmp_path / "first", *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 8
    monkeypatch.setattr("data.dataset.read_frames", lambda *_: pytest.fail("a cached clip was decoded"))
    second = run(clips, tmp_path / "second", *cache)
    for folder in (first, second):
        assert [row["text"] for row in lines(folder / "rollouts.jsonl")] == [
            row["text"] for row in lines(finished / "rollouts.jsonl")
        ]


def test_evaluation_takes_frames_as_training_did_unless_they_were_drawn(clips, tmp_path):
    for sampler, recipe in {"uniform-time": "uniform-time", "random-segment": "uniform"}.items():
        output = run(clips, tmp_path / sampler, "--sampler", sampler, "--steps", "1")
        assert json.loads((output / "best" / "recipe.json").read_text())["sampler"] == recipe


def test_flags_offer_what_there_is():
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(Config)}
    assert set(choices["precision"]) == PRECISIONS.keys() == footprint.PRECISIONS.keys()
    assert set(choices["sampler"]) == SAMPLERS.keys() and set(choices["prompt"]) == PROMPTS.keys()
    assert choices["mos_mapping"] == MAPPINGS
