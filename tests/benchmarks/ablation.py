"""The ablation table: each reward removed, two of them alone, several seeds, on the demo.

    python -m tests.benchmarks.ablation --out runs/ablation            # 7 x 3 runs, two at a time, one thread each
    python -m tests.benchmarks.ablation --out runs/ablation --table    # the table of the runs that are there

Each run has BUDGET, about a quarter of the demo's work; further flags go to train.py and come after it.
A run that has its summary.json is not repeated. Well-formed: share of the sampled answers of the last 20 steps that
earn the format reward, whether or not it was trained on.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from grpo.tables import mean_and_range
from rewards import Answers, FormatReward
from tests.benchmarks.runs import folder, run

VARIANTS = {
    "all four": "regression,ranking,temporal,format",
    "without regression": "ranking,temporal,format",
    "without ranking": "regression,temporal,format",
    "without temporal": "regression,ranking,format",
    "without format": "regression,ranking,temporal",
    "ranking alone": "ranking",
    "regression alone": "regression",
}
BUDGET = ("--steps", "120", "--videos-per-step", "8", "--lr", "3e-4")
LAST_STEPS = 20


def well_formed(path: Path) -> float:
    rows = [json.loads(line) for line in (path / "rollouts.jsonl").open(encoding="utf-8")]
    texts = [row["text"] for row in rows if row["step"] > rows[-1]["step"] - LAST_STEPS]
    return FormatReward()(Answers.from_texts([texts], torch.ones(1))).mean().item()


def measured(path: Path) -> dict[str, float]:
    summary = json.loads((path / "summary.json").read_text())
    after = {name: summary["after"][name] for name in ("srcc", "plcc", "rmse")}
    return {"srcc before": summary["before"]["srcc"], **after, "well-formed": well_formed(path)}


def table(out: Path, variants: list[str], seeds: list[int]) -> str:
    """Mean and, in brackets, lowest to highest over the seeds where the figure is defined; how many are not."""
    lines = []
    for variant in variants:
        runs = [measured(path) for seed in seeds if (path := folder(out, variant, seed)) and path.exists()]
        if not runs:
            continue
        if not lines:
            lines = [" | ".join(["| rewards", "seeds", *runs[0]]) + " |", "|---" * (len(runs[0]) + 2) + "|"]
        cells = [mean_and_range([row[name] for row in runs]) for name in runs[0]]
        lines.append(" | ".join([f"| {variant}", str(len(runs)), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which rows")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    args.out = args.out.resolve()
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [
                pool.submit(run, args.out, variant, seed, ["--rewards", VARIANTS[variant], *BUDGET, *extra])
                for seed in args.seeds
                for variant in args.variants
            ]
        for done in runs:
            done.result()  # raises what stopped a run
    print(table(args.out, args.variants, args.seeds))


if __name__ == "__main__":
    main()
