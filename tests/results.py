"""Folders as evaluate.py and train.py leave them, with what a test wants in them."""

import csv
import json
import random
from pathlib import Path

COLUMNS = ("path", "mos", "target", "score", "spread", "status", "reason", "flags", "reasoning")
METRICS = ("srcc", "krcc", "plcc", "plcc_fitted", "rmse", "rmse_fitted")


def row(path: str, target: float, score: float | None, **fields: str) -> dict:
    """A line of predictions.csv; one without a score is unreadable unless `fields` say otherwise."""
    status = {"status": "unreadable", "reason": "missing"} if score is None else {"status": "ok"}
    return {"path": path, "mos": 20 * target, "target": f"{target:.4f}", "score": score, **status, **fields}


def some_rows(number: int, seed: int = 0) -> list[dict]:
    """Scores with two decimals around the MOS, many at the ends of bins; every ninth has none."""
    rng = random.Random(seed)
    rows = []
    for k in range(number):
        target = rng.choice([round(rng.uniform(1, 5), 4), rng.randint(4, 20) / 4])
        score = round(min(5, max(1, 0.5 * target + 1.5 + rng.gauss(0, 0.4))) * rng.choice([4, 100])) / 100
        score = score if score >= 1 else rng.randint(4, 20) / 4
        rows.append(row(f"clips/{k:03d}.mp4", target, None if k % 9 == 4 else score, reasoning=f"It is number {k}."))
    return rows


def measured(rows: list[dict], **fields) -> dict:
    """Metrics of a data set: any numbers, but for the counts."""
    scored = sum(row["score"] is not None for row in rows)
    figures = {name: 0.5 + k / 10 for k, name in enumerate(METRICS)}
    counts = {"scored": scored, "listed": len(rows), "coverage": scored / len(rows), "undefined": {}}
    return figures | counts | fields


def write_evaluation(folder: Path, rows: dict[str, list[dict]], **fields) -> Path:
    for name, lines in rows.items():
        (folder / name).mkdir(parents=True)
        write_csv(folder / name / "predictions.csv", COLUMNS, lines)
    metrics = {
        "model": "runs/a/best",
        "recipe": {"frames": 6},
        "scoring": {"score": "greedy"},
        "command": "evaluate.py",
    }
    metrics |= {"mos_range": [1, 5], "higher_is_better": True, "versions": {"torch": "2.15"}, "means": {}}
    metrics |= {"datasets": {name: measured(lines) for name, lines in rows.items()}} | fields
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def write_csv(file: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        writer = csv.DictWriter(lines, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
