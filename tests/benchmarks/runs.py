"""Runs of train.py for a benchmark: a folder for each variant and seed, and no run twice."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(' ', '-')}-{seed}"


def run(out: Path, variant: str, seed: int, flags: list[str]) -> None:
    """Train with `flags`, on one thread, unless the run has its summary.json; ends the program if training fails."""
    path = folder(out, variant, seed)
    if (path / "summary.json").exists():
        return
    command = [sys.executable, "train.py", "--seed", str(seed), "--output", str(path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{variant}, seed {seed}:\n{done.stderr[-2000:]}")
    print(f"{variant}, seed {seed}: done", flush=True)
