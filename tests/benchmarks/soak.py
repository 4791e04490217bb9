"""A run that is killed again and again, and whether it ends as one that nothing happened to.

    python -m tests.benchmarks.soak --out runs/soak                   # demo clips, two processes; flags go to train.py

Two runs with the same flags under torchrun. The first is left alone. In the second, at random moments (`--pause` gives
the least and the longest time between two), SIGKILL goes to one rank, and torchrun begins anew, or to all of them and
torchrun, and the same command is given again. At the end the files of the last checkpoints have to be the same byte for
byte, but for state.json, which holds times; and the lines of both runs, but for times.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

PROCESSES = 2
MEASURED = {"phase_s", "tokens_per_s", "peak_memory_mib"}  # fields of metrics.jsonl that no two runs share
POLL_S = 0.1


def start(run: Path, flags: list[str]) -> subprocess.Popen:
    """A run under torchrun, or what is left of it; its output goes to the end of RUN.log."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "--max-restarts", "1000"]
    command = [sys.executable, "-m", *torchrun, "train.py", *flags, "--output", str(run), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def ranks(torchrun: int) -> list[int]:
    """Process ids of torchrun's children."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == torchrun]


def rows(file: Path) -> list[dict]:
    """The whole lines of a log, which may be growing."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def progress(run: Path) -> tuple[int, int]:
    """Steps in the log, and steps in a checkpoint: a kill at this moment costs the difference."""
    saved = max((int(folder.name.removeprefix("step_")) for folder in run.glob("checkpoints/step_*")), default=0)
    return max((row["step"] for row in rows(run / "metrics.jsonl")), default=0), saved


def disturb(run: Path, flags: list[str], pause: tuple[float, float], most: int, seed: int, steps: int = 1) -> dict:
    """Train under kills; returns how many of which kind, and what they cost.

    Args:
        pause: least and longest time in seconds from one kill to the next.
        most: kills, after which the run is left alone.
        steps: how many it gets further, at least, before the next kill.

    Raises RuntimeError if the run ends by anything but its last step.
    """
    draw = random.Random(seed)
    kills, lost, reached = Counter(), [], 0
    begun = time.monotonic()
    process, due = start(run, flags), begun + draw.uniform(*pause)
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            done, saved = progress(run)
            waits = time.monotonic() < due or done < reached + steps
            if kills.total() == most or waits or not (alive := ranks(process.pid)):
                continue
            kind = draw.choice(("one rank", "all"))
            for pid in [draw.choice(alive)] if kind == "one rank" else [process.pid, *alive]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            kills[kind] += 1
            lost.append(done - saved)
            reached, due = done, time.monotonic() + draw.uniform(*pause)
            if kind == "all":
                process.wait()
                process = start(run, flags)
        if process.returncode:
            raise RuntimeError(f"{run}: ended with {process.returncode}; see {run.with_suffix('.log')}")
        return {"kills": dict(kills), "steps lost": lost, "seconds": round(time.monotonic() - begun)}
    finally:
        process.terminate()
        process.wait()


def differences(run: Path, other: Path) -> list[str]:
    """What the ends of two runs do not share: files of the last checkpoint, logs. Nothing, if all went well."""
    ends = [max(path.glob("checkpoints/step_*")) for path in (run, other)]
    hashes = [json.loads((end / "manifest.json").read_text()) for end in ends]
    for path, files, end in zip((run, other), hashes, ends):
        files["state.json"] = end.name  # its own holds times
        for log in ("metrics.jsonl", "rollouts.jsonl"):
            files[log] = [{name: row[name] for name in row.keys() - MEASURED} for row in rows(path / log)]
    return [name for name in sorted({*hashes[0], *hashes[1]}) if hashes[0].get(name) != hashes[1].get(name)]


def soak(out: Path, flags: list[str], pause: tuple[float, float], most: int, seed: int, steps: int = 1) -> dict:
    """Both runs, and what came of them; see `disturb`."""
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    alone = start(out / "undisturbed", flags)
    if alone.wait():
        raise RuntimeError(f"ended with {alone.returncode}; see {out / 'undisturbed.log'}")
    seconds = round(time.monotonic() - begun)
    result = disturb(out / "disturbed", flags, pause, most, seed, steps)
    result |= {"seconds undisturbed": seconds, "steps": progress(out / "disturbed")[1]}
    return result | {"differences": differences(out / "undisturbed", out / "disturbed")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of both runs")
    parser.add_argument("--pause", type=float, nargs=2, default=(60, 120), metavar="S", help="least and longest")
    parser.add_argument("--kills", type=int, default=1000, help="at most")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    args, extra = parser.parse_known_args()
    result = soak(args.out.resolve(), extra, tuple(args.pause), args.kills, args.seed)
    print(json.dumps(result | {"flags": shlex.join(extra)}, indent=2))
    return int(bool(result["differences"]))


if __name__ == "__main__":
    sys.exit(main())
