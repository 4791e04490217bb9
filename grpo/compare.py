"""Evaluations and training runs side by side: metrics, settings that differ, paired tests, seeds, learning curves."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from grpo import charts
from grpo.config import Config
from grpo.curves import curves
from grpo.page import write_page
from grpo.results import METRICS, read_result
from grpo.tables import NONE, Table, as_text, heading, mean_and_range, metrics_table, shown

PAIRED = ("srcc", "plcc")
FREE = {field.name for field in dataclasses.fields(Config) if field.metadata["changes"] == "nothing"}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config) if field.name not in FREE}

Paired = Callable[[list[float | None], list[float | None], list[float], str], dict]


def compare(folders: Sequence[str], paired: Paired, page: Path | None = None) -> dict:
    """The comparison of evaluations or training runs, as JSON can hold it; its page is written to the file `page`.

    paired(scores, first, targets, metric): `difference` of a metric (scores - first), `interval`, `p_value` and
    `videos`, from resampling the videos that both have scored; where the metric is not defined the first three are
    None, and `undefined` says why.

    kinds: 'evaluation' or 'training', by folder. datasets: metrics by data set and folder. settings: those that
    differ between folders of a kind, by kind, setting and folder. against_first: a paired test for each other folder,
    data set and metric, or `not_compared`, why not. seeds: folders that differ in nothing but the seed.
    Raises ValueError for fewer than two folders, and naming one that is neither an evaluation nor a run.
    """
    if len(set(folders)) < max(2, len(folders)):
        raise ValueError("--compare: name two or more different folders")
    results = {folder: read_result(Path(folder)) for folder in folders}
    names = dict.fromkeys(name for result in results.values() for name in result["datasets"])
    comparison = {
        "higher_is_better": {name: higher for name, (_, higher) in METRICS.items()},
        "kinds": {folder: result["kind"] for folder, result in results.items()},
        "datasets": {
            name: {folder: r["datasets"][name] for folder, r in results.items() if name in r["datasets"]}
            for name in names
        },
        "settings": differing_settings(results),
        "against_first": against_first(results, paired),
        "seeds": seed_groups(results),
    }
    if page:
        styles = {folder: charts.style(index) for index, folder in enumerate(folders)}
        drawn = {"styles": styles, "tables": tables(comparison), "curves": curves(results)}
        write_page(page, "compare.html", **drawn)
    return comparison


def text(comparison: dict) -> str:
    """The comparison for a terminal."""
    return "\n\n".join(map(as_text, tables(comparison)))


# ---- what is compared


def effective_settings(result: dict) -> dict:
    """Settings that can change a result; a flag that a run does not know yet had its default."""
    given = {name: value for name, value in result["settings"].items() if name not in FREE}
    return DEFAULTS | given if result["kind"] == "training" else given


def differing_settings(results: Mapping[str, dict]) -> dict[str, dict[str, dict]]:
    """{kind: {setting: {folder: value}}}, for settings that are not the same in all folders of a kind."""
    found = {}
    for kind in ("training", "evaluation"):
        settings = {folder: effective_settings(result) for folder, result in results.items() if result["kind"] == kind}
        names = dict.fromkeys(name for values in settings.values() for name in values)
        rows = {name: {folder: values.get(name) for folder, values in settings.items()} for name in names}
        found[kind] = {name: row for name, row in rows.items() if len(set(map(repr, row.values()))) > 1}
    return {kind: rows for kind, rows in found.items() if rows}


def against_first(results: Mapping[str, dict], paired: Paired) -> list[dict]:
    """Paired tests of every folder but the first against it, on each data set of either."""
    (first, reference), *others = results.items()
    tests = []
    for folder, result in others:
        for name in dict.fromkeys([*reference["predictions"], *result["predictions"]]):
            pair = {"folder": folder, "first": first, "dataset": name}
            rows, mine = (r["predictions"].get(name) for r in (reference, result))
            if rows is None or mine is None:
                tests.append(pair | {"not_compared": f"{first if rows is None else folder} has no predictions of it"})
                continue
            rows, mine = ({row["path"]: row for row in found} for found in (rows, mine))
            shared = [path for path in rows if path in mine]
            other = [path for path in shared if round(rows[path]["target"], 4) != round(mine[path]["target"], 4)]
            if not shared or other:
                reason = f"{len(other)} of {len(shared)} shared videos have another MOS" if other else "no shared video"
                tests.append(pair | {"not_compared": reason})
                continue
            scores = [[found[path]["score"] for path in shared] for found in (mine, rows)]
            targets = [rows[path]["target"] for path in shared]
            tests += [pair | {"metric": metric, **paired(*scores, targets, metric)} for metric in PAIRED]
    return tests


def seed_groups(results: Mapping[str, dict]) -> list[dict]:
    """Folders whose settings are the same but for the seed, which differs: {'folders', 'seeds'}."""
    groups: dict[str, dict] = {}
    for folder, result in results.items():
        settings = effective_settings(result)
        seed = settings.pop("seed", None)
        groups.setdefault(json.dumps([result["kind"], settings], sort_keys=True), {})[folder] = seed
    return [
        {"folders": list(group), "seeds": list(group.values())}
        for group in groups.values()
        if len(group) > 1 and len(set(group.values())) == len(group)
    ]


# ---- how it is shown


def tables(comparison: dict) -> list[Table]:
    found = []
    for name, rows in comparison["datasets"].items():
        table = metrics_table(f"Metrics: {name}", "folder", rows)
        absent = [folder for folder in comparison["kinds"] if folder not in rows]
        found.append(table._replace(notes=[*table.notes, *(f"{folder}: not measured" for folder in absent)]))
    for group in comparison["seeds"]:
        found.append(seeds_table(group, comparison["datasets"]))
    if comparison["against_first"]:
        found.append(tests_table(comparison["against_first"]))
    for kind, rows in comparison["settings"].items():
        folders = list(next(iter(rows.values())))
        cells = [[name, *(NONE if row[f] is None else str(row[f]) for f in folders)] for name, row in rows.items()]
        notes = [f"Left out: settings that change no result. {NONE}: none, or not set."]
        found.append(Table(f"Settings that differ ({kind})", ["setting", *folders], cells, notes))
    return found


def seeds_table(group: dict, datasets: Mapping[str, dict]) -> Table:
    """A row for each data set that one of the group's folders was measured on."""
    rows, names = [], [name for name in METRICS if any(name in m for rows in datasets.values() for m in rows.values())]
    for dataset, metrics in datasets.items():
        measured = [metrics[folder] for folder in group["folders"] if folder in metrics]
        if measured:
            cells = [mean_and_range([found.get(name) for found in measured]) for name in names]
            rows.append([dataset, str(len(measured)), *cells])
    header = ["data set", "seeds", *map(heading, names)]
    notes = [f"Mean (lowest to highest) of seeds {', '.join(map(str, group['seeds']))}: {', '.join(group['folders'])}"]
    return Table("Seeds of one setting", header, rows, notes)


def tests_table(tests: Sequence[dict]) -> Table:
    rows, notes = [], []
    for test in tests:
        row = f"{test['folder']}, {test['dataset']}"
        if "not_compared" in test:
            notes.append(f"Not compared: {row}: {test['not_compared']}")
            continue
        interval = test["interval"] and "[{:+.3f}, {:+.3f}]".format(*test["interval"])
        difference = NONE if test["difference"] is None else f"{test['difference']:+.3f}"
        figures = [str(test["videos"]), difference, interval or NONE, shown(test["p_value"], 4)]
        rows.append([row, METRICS[test["metric"]][0], *figures])
        if test["difference"] is None:
            notes.append(f"{row}: no {METRICS[test['metric']][0]} difference: {test['undefined']}")
    notes.append("Above 0: better than the first. Intervals and p are about other videos, not about other seeds.")
    notes.append("A p-value is that of one comparison, not corrected for their number.")
    header = ["folder, data set", "metric", "videos", "difference", "interval", "p"]
    return Table(f"Paired bootstrap against {tests[0]['first']}", header, rows, notes)
