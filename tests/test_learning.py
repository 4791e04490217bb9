"""GRPO learns: a short run on a handful of clips raises the reward."""

import json
import statistics

import train
from data import synthetic
from grpo.config import parse_config


def test_sixty_four_steps_raise_the_regression_reward(tmp_path):
    labels = synthetic.write_clips(tmp_path / "clips", {"train": 16}, seed=21)
    flags = f"--labels {labels} --videos {tmp_path / 'clips'} --output {tmp_path / 'run'} --rewards regression,format"
    assert train.main(parse_config([*flags.split(), "--steps", "64", "--videos-per-step", "8", "--workers", "0"])) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["rewards"]["regression"]["mean"] for row in rows]
    assert statistics.mean(rewards[-8:]) > statistics.mean(rewards[:8]) + 0.08
    assert statistics.mean(row["rewards"]["format"]["mean"] for row in rows[-8:]) > 0.9
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] is None and summary["best"] is None  # there is no such split to measure on
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
