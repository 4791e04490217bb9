"""What evaluations and training runs wrote, read back: metrics.json, predictions.csv, summary.json, metrics.jsonl."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path

METRICS = {  # name in the files: name in tables, whether a higher one is better
    "srcc": ("SRCC", True),
    "krcc": ("KRCC", True),
    "plcc": ("PLCC", True),
    "plcc_fitted": ("PLCC fitted", True),
    "rmse": ("RMSE", False),
    "rmse_fitted": ("RMSE fitted", False),
}


def read_json(file: Path) -> dict:
    """Raises ValueError naming the file if it is missing or no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def read_lines(file: Path) -> list[dict]:
    """The rows of a .jsonl file; what is behind the last newline is not finished yet and left out.

    Raises ValueError naming the file and line that is no JSON.
    """
    rows = []
    for k, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}:{k}: {error}") from error
    return rows


def read_predictions(file: Path) -> list[dict]:
    """The rows of a predictions.csv, with `target` (1..5) as a number, and `score` and `spread` as one or None.

    Of a file name that is no UTF-8 the bytes are kept, as Python's own file names keep them. Raises ValueError naming
    the file, and the line if one is at fault.
    """
    rows = []
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                try:
                    rows.append(row | {name: number(row.get(name)) for name in ("target", "score", "spread")})
                    if not row.get("path") or rows[-1]["target"] is None:
                        raise ValueError("a row needs a path and a target")
                except ValueError as error:
                    raise ValueError(f"{file}:{reader.line_num}: {error}") from error
    except (OSError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    return rows


def number(text: str | None) -> float | None:
    """A finite number, or None for an empty cell."""
    value = float(text) if text else None
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def why_undefined(metrics: dict, name: str) -> str | None:
    """The reason why a metric is None, or None if it is a number."""
    if metrics.get(name) is not None:
        return None
    reason = metrics.get("undefined")
    if isinstance(reason, dict):
        reason = reason.get(name)
    return reason or "not measured"


def read_evaluation(folder: Path) -> dict:
    """metrics.json of an evaluation, and `predictions`: the rows of each data set by its name."""
    metrics = read_json(folder / "metrics.json")
    if "datasets" not in metrics:
        raise ValueError(f"{folder / 'metrics.json'}: names no datasets")
    rows = {name: read_predictions(folder / name / "predictions.csv") for name in metrics["datasets"]}
    return metrics | {"predictions": rows}


def read_summary(run: Path, settings: Mapping) -> dict:
    """summary.json; {} if there is none, or if the run was started again since, with other flags: `settings`."""
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    return summary if summary.get("settings") == settings else {}


def read_result(folder: Path) -> dict:
    """An evaluation or a training run in one form, to be compared.

    kind: 'evaluation' or 'training'. settings: what it was made with. datasets: metrics by data set; those of a
    training run are 'test', 'test before training' and 'best of the validations'. predictions: rows by data set, or
    None. steps: the rows of metrics.jsonl, none for an evaluation. Raises ValueError naming a folder that is neither.
    """
    if (folder / "metrics.json").exists():
        found = read_evaluation(folder)
        settings = {"model": found.get("model"), **found.get("recipe", {}), **found.get("scoring", {})}
        kept = {name: found[name] for name in ("datasets", "predictions")}
        return {"kind": "evaluation", "settings": settings, **kept, "steps": []}
    if not ((folder / "config.json").exists() and (folder / "metrics.jsonl").exists()):
        raise ValueError(f"{folder}: neither an evaluation (metrics.json) nor a run (config.json, metrics.jsonl)")
    settings = read_json(folder / "config.json")
    summary = read_summary(folder, settings)
    measured = {"test": "after", "test before training": "before", "best of the validations": "best"}
    file = folder / "predictions.csv"
    return {
        "kind": "training",
        "settings": settings,
        "datasets": {name: summary[key] for name, key in measured.items() if summary.get(key)},
        "predictions": {"test": read_predictions(file) if summary and file.exists() else None},
        "steps": read_lines(folder / "metrics.jsonl"),
    }
