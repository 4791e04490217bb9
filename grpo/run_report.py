"""The page about a training run, finished or not: figures, curves, some of its answers, warnings, settings.

    python -m grpo.run_report RUN

writes RUN/report.html, as train.py does at the end.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo.checkpoint import STATE, step_folders
from grpo.config import PRESETS, Config, Parser, option
from grpo.curves import phases, run_curves
from grpo.health import SIGNS, Health
from grpo.page import write_page
from grpo.results import read_json, read_lines, read_summary
from grpo.tables import NONE, Table, metrics_table, shown

PAGE = "report.html"


def write_run_report(run: Path) -> Path:
    """Write the page about the run in a folder, and return its path.

    Raises ValueError naming a folder that holds no run, or a file of it that is wrong, and OSError.
    """
    if not ((run / "config.json").exists() and (run / "metrics.jsonl").exists()):
        raise ValueError(f"{run}: not a training run, which has config.json and metrics.jsonl")
    settings, rows = read_json(run / "config.json"), read_lines(run / "metrics.jsonl")
    summary = read_summary(run, settings)
    state = summary or read_state(run)
    inspected = {int(file.stem[5:]): f"inspect/{file.name}" for file in sorted(run.glob("inspect/step_*.html"))}
    write_page(
        run / PAGE,
        "run.html",
        name=run.resolve().name,
        about=about(settings, rows, state),
        command=summary.get("command"),
        missing=missing(run, settings, rows, summary, state),
        figures=figures(rows, summary, state),
        curves=run_curves(rows, settings),
        phases=phases(rows),
        samples=samples(run / "rollouts.jsonl", [row["step"] for row in rows]),
        inspected=inspected,
        warnings=warnings(rows),
        skipped=[row["step"] for row in rows if row["skipped"]],
        bad_steps=[file.name for file in sorted(run.glob("bad_step_*.json"))],
        bad_videos=bad_videos(run / "bad_videos.jsonl"),
        changed=changed_settings(settings),
        settings={option(name): value for name, value in settings.items()},
    )
    return run / PAGE


# ---- what is known of the run


def read_state(run: Path) -> dict:
    """What the newest checkpoint knows of the run; {} without any."""
    folders = step_folders(run)
    return read_json(folders[-1] / STATE) if folders else {}


def about(settings: Mapping, rows: Sequence[Mapping], state: Mapping) -> dict[str, str]:
    """What is known of the run as a whole."""
    seconds = sum(sum(row["phase_s"].values()) for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items())
    found = {
        "preset": settings["preset"],
        "model": settings["model"],
        "steps": f"{rows[-1]['step'] if rows else 0} of {settings['steps']}",
        "answers": f"{settings['videos_per_step']} videos a step, {settings['group_size']} answers each",
        "rewards": settings["rewards"],
        "time of the steps": duration(seconds) + (f", {seconds / len(rows):.2f} s each" if rows else ""),
        "processes": str(state.get("processes", "")),
        "versions": versions,
    }
    return {name: text for name, text in found.items() if text}


def duration(seconds: float) -> str:
    """
    >>> duration(59.6), duration(3599), duration(90061)
    ('1 min 0 s', '59 min 59 s', '25 h 1 min')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def missing(run: Path, settings: Mapping, rows: Sequence[Mapping], summary: Mapping, state: Mapping) -> list[str]:
    """What is not known, or was never measured, and why."""
    found = []
    if not summary:
        found.append(
            "The run has not finished: there is no summary.json of its last start. Its command, its versions and the "
            "test after training are not known."
        )
        found += [] if state else ["It has no checkpoint yet: the test before training is not known either."]
    if state and state["before"] is None:
        found.append("No test: the label file has no split 'test'.")
    if not any(row["val"] for row in rows):
        found.append("No validation: the label file has no split 'val', or no step was --eval-every's.")
    elif best(rows, summary) is None:
        found.append("No best validation: none had an SRCC.")
    if summary and settings["resume"]:
        found.append("With --resume the command is that of the last start, which need not be the first.")
    if not (run / "rollouts.jsonl").exists():
        found.append("There is no rollouts.jsonl: no answers are shown.")
    return found


def best(rows: Sequence[Mapping], summary: Mapping) -> dict | None:
    """The first of the validations with the highest SRCC, and its `step`."""
    if summary:
        return summary["best"]
    found = [{"step": row["step"], **row["val"]} for row in rows if row["val"] and row["val"]["srcc"] is not None]
    return max(found, key=lambda validation: validation["srcc"], default=None)


def figures(rows: Sequence[Mapping], summary: Mapping, state: Mapping) -> dict:
    """`table` of all metrics, None if nothing was measured, and the `gains` (name, before, after) of SRCC and PLCC."""
    before, validation, after = state.get("before"), best(rows, summary), summary.get("after")
    measured = {
        "test before training": before,
        f"best of the validations, step {validation['step']}" if validation else "": validation,
        f"test after training, model of step {summary['after_step']}" if after else "": after,
    }
    measured = {name: metrics for name, metrics in measured.items() if metrics}
    gains = [(name.upper(), before[name], after[name]) for name in ("srcc", "plcc")] if before and after else []
    return {"table": metrics_table("Measured", "split", measured) if measured else None, "gains": gains}


def warnings(rows: Sequence[Mapping]) -> list[str]:
    """What grpo/health.py has to say, as it did during the run."""
    return [
        f"{SIGNS[name].says.format(found['number'])} ({name}): first at step {found['first']}, "
        f"at {found['steps']} of {len(rows)} steps."
        for name, found in Health(rows).found.items()
        if found["steps"]
    ]


def bad_videos(file: Path) -> Table | None:
    rows = read_lines(file) if file.exists() else []
    cells = [[row["path"], str(row["step"]), row["reason"], row["detail"]] for row in rows]
    return (
        Table("Videos that could not be read, and were replaced", ("video", "step", "reason", ""), cells)
        if rows
        else None
    )


def changed_settings(settings: Mapping) -> Table | None:
    """A row for each flag that is not the preset's; None if all are."""
    preset = {field.name: field.default for field in dataclasses.fields(Config)}
    preset |= PRESETS.get(settings["preset"], {}) | {"preset": settings["preset"]}
    rows = [
        [option(name), *(NONE if value is None else str(value) for value in (was, preset.get(name)))]
        for name, was in settings.items()
        if was != preset.get(name)
    ]
    title = f"Settings that are not those of --preset {settings['preset']}"
    return Table(title, ("flag", "this run", "preset"), rows, [f"{NONE}: none, or not set."]) if rows else None


# ---- answers


def samples(file: Path, steps: Sequence[int]) -> list[dict]:
    """Of the first, the middle and the last step: `step` and `videos`, with the lowest, middle and highest MOS."""
    if not (steps and file.exists()):
        return []
    found = []
    for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
        groups: dict[str, list[dict]] = {}
        for row in rows_of_step(file, step):
            groups.setdefault(row["video"], []).append(row)
        ranked = sorted(groups.values(), key=lambda group: group[0]["mos"])
        found.append({"step": step, "videos": [shown_group(step, ranked[k]) for k in ends_and_middle(len(ranked))]})
    return found


def ends_and_middle(number: int) -> list[int]:
    """The first, the middle and the last of so many places, none of them twice."""
    return list(dict.fromkeys((0, number // 2, number - 1))) if number else []


def shown_group(step: int, rows: Sequence[Mapping]) -> dict:
    """A video's `path` and `mos`, and its best, median and worst answer by reward: `answers` and their `table`."""
    ranked = sorted(rows, key=lambda row: row["reward"], reverse=True)
    names = {0: "best", len(ranked) - 1: "worst"} if len(ranked) > 1 else {0: "the only one"}
    chosen = {names.get(k, "median"): ranked[k] for k in ends_and_middle(len(ranked))}
    cells = {"score": [shown(row["score"], 2) for row in chosen.values()]}
    for name in rows[0]["rewards"]:
        cells[name] = [shown(row["rewards"][name]) for row in chosen.values()]
    cells["reward"] = [shown(row["reward"]) for row in chosen.values()]
    cells["advantage"] = [f"{row['advantage']:+.3f}" for row in chosen.values()]
    path = rows[0]["video"]
    title = f"Step {step}, {path}: {len(chosen)} of {len(rows)} answers"
    table = Table(title, ("", *chosen), [[name, *values] for name, values in cells.items()])
    answers = [{"name": name, "text": row["text"], "unparsed": row["unparsed"]} for name, row in chosen.items()]
    return {"path": path, "mos": rows[0]["mos"], "table": table, "answers": answers}


def rows_of_step(file: Path, step: int) -> list[dict]:
    """The finished lines of a step in a file of JSON lines whose steps never fall.

    Found by bisection, so it takes no longer in a file of gigabytes. Raises ValueError naming a file of other lines.
    """

    def next_row() -> dict | None:
        line = lines.readline()
        try:
            return json.loads(line) if line.endswith(b"\n") else None
        except ValueError as error:
            raise ValueError(f"{file}: the line that ends at byte {lines.tell()}: {error}") from error

    with file.open("rb") as lines:
        low, high = 0, file.stat().st_size  # the line that follows byte `low` is of an earlier step, unless low is 0
        while high - low > 1:
            middle = (low + high) // 2
            lines.seek(middle)
            lines.readline()
            row = next_row()
            low, high = (middle, high) if row and row["step"] < step else (low, middle)
        lines.seek(low)
        if low:
            lines.readline()
        found = []
        while (row := next_row()) and row["step"] <= step:
            found += [row] if row["step"] == step else []
        return found


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m grpo.run_report", description="Write the page about training runs.")
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, finished or not")
    for run in parser.parse_args(arguments).run:
        try:
            print(write_run_report(run))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
