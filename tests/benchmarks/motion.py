"""Does the motion token help? The demo with it and without, several seeds, on all test clips and on stuttering ones.

    python -m tests.benchmarks.motion --out runs/motion            # 2 x 3 runs, two at a time, one thread each
    python -m tests.benchmarks.motion --out runs/motion --table    # the table of the runs that are there

Both start from the tiny checkpoint and have the demo's budget; further flags go to train.py. Both are scored on the
very same clips: the demo's test split, its clips with the stutter distortion (freezes and holds, often beside a second
distortion), and those of a larger split that nothing else has seen. A run that has its summary.json is not repeated;
one that was cut off goes on from its last checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path

from data import synthetic
from data.labels import Clip, read_labels
from grpo.ablate import Row, folder, train_all
from grpo.tables import Table, as_markdown, mean_and_range
from models.scorer import load_scorer
from rewards.metrics import correlations

DEMO = Path("clips/demo")
VARIANTS = {"with motion token": "slowfast", "without": "none"}  # --motion
FRESH_SEED = 2  # the demo's clips have seed 0, the tiny checkpoint's 1
SCORES = "motion_scores.json"  # of a run, by set of clips and path


def with_stutter(clips: list[Clip]) -> list[Clip]:
    return [clip for clip in clips if "stutter" in clip.extra["severities"]]


def clips_to_score(out: Path, fresh: int) -> dict[str, tuple[Path, list[Clip]]]:
    """Folder and clips of each set that is scored; writes `fresh` clips, of which the stuttering ones are kept."""
    extra = out / f"clips-{fresh}"
    if not extra.exists():
        synthetic.write_clips(extra, {"fresh": fresh}, FRESH_SEED)
    test = read_labels(DEMO / "labels.jsonl", "test")
    return {"test": (DEMO, test), "fresh": (extra, with_stutter(read_labels(extra / "labels.jsonl")))}


def score(path: Path, sets: dict[str, tuple[Path, list[Clip]]]) -> None:
    """Write the greedy scores of a run's best model, for every clip of every set."""
    if (path / SCORES).exists():
        return
    scorer = load_scorer(path / "best", device="cpu")
    scores = {}
    for name, (root, clips) in sets.items():
        answers = scorer.scores([clip.path for clip in clips], root)
        scores[name] = {answer.path: answer.value for answer in answers}
    (path / SCORES).write_text(json.dumps(scores))


def table(out: Path, seeds: list[int], sets: dict[str, tuple[Path, list[Clip]]]) -> str:
    """A row for each set of clips and variant: SRCC and PLCC over the seeds whose scores are there."""
    test, fresh = sets["test"][1], sets["fresh"][1]
    rows = {
        "demo's test split": ("test", test),
        "of these, stuttering": ("test", with_stutter(test)),
        "fresh, stuttering": ("fresh", fresh),
    }
    lines = []
    for title, (name, clips) in rows.items():
        for variant in VARIANTS:
            found = []
            for seed in seeds:
                file = folder(out, variant, seed) / SCORES
                if file.exists():
                    scores = json.loads(file.read_text())[name]
                    found.append(correlations([scores[clip.path] for clip in clips], [clip.target for clip in clips]))
            columns = [mean_and_range([row[figure] for row in found]) for figure in ("srcc", "plcc")]
            lines.append([title, str(len(clips)), variant, str(len(found)), *columns])
    return as_markdown(Table("Motion", ["clips", "number", "model", "seeds", "SRCC", "PLCC"], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/motion"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fresh", type=int, default=800, help="fresh clips to write; those that stutter are scored")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    if not DEMO.exists():
        synthetic.write_clips(DEMO)
    sets = clips_to_score(args.out, args.fresh)
    if not args.table:
        rows = [Row("", variant, ("--motion", motion, *extra)) for variant, motion in VARIANTS.items()]
        if failed := train_all(args.out, rows, args.seeds, args.jobs):
            sys.exit("\n".join(failed))
        for seed in args.seeds:
            for variant in VARIANTS:
                score(folder(args.out, variant, seed), sets)
    print(table(args.out, args.seeds, sets))


if __name__ == "__main__":
    main()
