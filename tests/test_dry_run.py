"""The command as a user types it: what it prints, what it refuses, and that it leaves nothing behind."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import train
from data.prompts import PROMPTS
from grpo.config import TINY_MODEL, Config, parse_config
from models import released
from models.dry_run import report, text_tokens
from models.loading import load_policy
from models.shapes import network

ROOT = Path(__file__).resolve().parents[1]


def command(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_largest_model_in_little_memory(tmp_path):
    done = command(tmp_path, "--dry-run", "--preset", "internvl3-8b", "--world-size", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,447 of our layout make 1,351 of the released one" in done.stdout
    assert "7,999.1   7,965.5" in done.stdout and "trainable share: 99.6 %" in done.stdout
    assert "6 frames x 256 + 1 of motion" in done.stdout and "largest term: gathered weights" in done.stdout
    assert "32 videos on 8 process(es) (fsdp), 4 each, and as many perturbed copies" in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_takes_less_than_two_gib(tmp_path):
    measured = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    measured += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # KiB
    words = [sys.executable, str(ROOT / "train.py"), "--dry-run", "--preset", "internvl3-8b"]
    done = subprocess.run([sys.executable, "-c", measured, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 100_000 < int(done.stdout) < 2 * 2**20, done.stderr


def test_the_demo_with_its_tokenizer(tmp_path):
    done = command(tmp_path, "--dry-run", "--rewards", "regression,format", "--beta", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "of text (counted)" in done.stdout and "perturbed" not in done.stdout and "reference" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_table_of_modes_is_what_it_counts(monkeypatch):
    monkeypatch.setattr("models.dry_run.check_one_to_one", lambda keys: None)  # slow, and tested below
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(internvl3-\w+)` \| (\d+) \| (?:`(.+?)` )?\| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) >= 10
    for preset, processes, flags, size in rows:
        config = parse_config(["--dry-run", "--preset", preset, "--world-size", processes, *flags.split()])
        text = report(config, train.prompt_words(config), train.reward_table(config).needs_perturbed)
        assert f"\npeak: {size} GiB" in text, (preset, processes, flags)


def test_text_is_counted_as_the_policy_counts_it():
    config, words = Config(), PROMPTS["released-train"]
    policy = load_policy(TINY_MODEL)
    prompt = policy.prompt_ids(words.system, words.user_text, config.frames)
    slots = config.frames * policy.tokens_per_frame + policy.has_motion
    assert text_tokens(TINY_MODEL, words, config.frames, policy.has_motion) == (len(prompt) - slots, "counted")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--world-size", "8"], "--world-size 8: goes with --dry-run"),
        (["--dry-run", "--model", "nobody/InternVL9"], "--model nobody/InternVL9"),
        (["--dry-run", "--model", "broken"], "--model broken"),
        (["--dry-run", "--preset", "internvl3-1b", "--world-size", "5"], "--world-size 5"),
        (["--dry-run", "--preset", "internvl3-1b", "--frames", "5"], "--frames 5"),
        (["--dry-run", "--preset", "internvl3-1b", "--image-side", "450"], "--image-side 450"),
        (["--dry-run", "--motion", "none", "--freeze", "motion"], "--freeze motion"),
        (["--dry-run", "--freeze", "vision,projector,language,motion"], "leaves nothing to train"),
        (["--preset", "internvl3-1b", "--labels", "l", "--videos", "v"], "--slowfast is needed"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, named):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        code = train.main(parse_config(arguments))
    except SystemExit as exit_:
        code = exit_.code
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert error.startswith("train.py: error: ") and error.count("\n") == 1 and named in error
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_saved_config_of_a_run_before_these_flags_still_loads():
    old = {name: value for name, value in asdict(Config()).items() if name not in ("dry_run", "world_size")}
    assert Config(**json.loads(json.dumps(old))) == Config()


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda key: key.replace("norm2", "norm1"), "not a source of exactly one"),
        (lambda key: key.replace("mlp1.", "mlp2."), "in no released part"),
        (lambda key: key.replace("language_model.", "llm."), "in no released part"),
    ],
)
def test_a_broken_key_map_is_found(monkeypatch, broken, named):
    right = released.released_key
    monkeypatch.setattr(released, "released_key", lambda ours: broken(right(ours)))
    with pytest.raises(ValueError, match=named):
        released.check_one_to_one(released.layout(*network("OpenGVLab/InternVL3-1B-hf", "slowfast")))
    with pytest.raises(ValueError, match=named):
        report(Config(dry_run=True), PROMPTS["released-train"], perturbed=True)


def test_a_query_without_its_key_and_value_is_found():
    keys = released.layout(*network("OpenGVLab/InternVL3-1B-hf", "slowfast"))
    released.check_one_to_one(keys)
    fused = "vision_model.encoder.layers.3.attn.qkv.weight"
    with pytest.raises(ValueError, match="not of one or three"):
        released.check_one_to_one(keys._replace(sources=keys.sources | {fused: keys.sources[fused][:2]}))
