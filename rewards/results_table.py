"""Results on several data sets as one table, beside what was published: rows, and their text and Markdown."""

from collections.abc import Mapping

from rewards.metrics import weighted_mean

DOMAINS = {"in": "in-domain mean", "ood": "OOD mean"}
MEASURED = ("srcc", "plcc", "plcc_fitted", "krcc", "rmse_fitted")


def results_table(results: Mapping[str, Mapping], benchmarks: Mapping[str, Mapping]) -> list[dict]:
    """One row a data set, in the order of `results`, then one for the mean of each domain that has any.

    Args:
        results: data set -> what `rewards.metrics.correlations` gives, and, under "intervals" if measured, what
            `rewards.metrics.intervals` gives.
        benchmarks: data set -> {"domain": "in" or "ood", "published": {model: {"srcc": ..., "plcc": ...}}}. A data set
            that is not among them has a row and no part in a mean.

    A row has `dataset`, `domain` (None: not among the benchmarks), `scored`, `listed`, the metrics of `MEASURED`,
    `srcc_interval`, `published` ({model: {"srcc", "plcc"}}, every model in every row) and `left_out`. Means are
    weighted by our scored videos, those of published figures too. Their `left_out` is column -> the data sets that have
    no value in it: {"srcc": [...], "VersusQ srcc": [...]}. What is unknown is None.
    """
    models = list(dict.fromkeys(m for name in results if name in benchmarks for m in benchmarks[name]["published"]))
    rows = [_row(name, result, benchmarks.get(name), models) for name, result in results.items()]
    for domain in DOMAINS:
        members = [row for row in rows if row["domain"] == domain]
        if members:
            rows.append(_mean(domain, members, models))
    return rows


def _row(name: str, result: Mapping, benchmark: Mapping | None, models: list[str]) -> dict:
    published = benchmark["published"] if benchmark else {}
    unknown = {"srcc": None, "plcc": None}
    return {
        "dataset": name,
        "domain": benchmark["domain"] if benchmark else None,
        **{key: result[key] for key in ("scored", "listed", *MEASURED)},
        "srcc_interval": result.get("intervals", {}).get("srcc"),
        "published": {model: published.get(model, unknown) for model in models},
        "left_out": {},
    }


def _mean(domain: str, members: list[dict], models: list[str]) -> dict:
    weights = {row["dataset"]: row["scored"] for row in members}
    columns = {name: {row["dataset"]: row[name] for row in members} for name in MEASURED}
    columns |= {
        f"{model} {metric}": {row["dataset"]: row["published"][model][metric] for row in members}
        for model in models
        for metric in ("srcc", "plcc")
    }
    means = {name: weighted_mean(values, weights) for name, values in columns.items()}
    return {
        "dataset": DOMAINS[domain],
        "domain": domain,
        **{key: sum(row[key] for row in members) for key in ("scored", "listed")},
        **{name: means[name]["mean"] for name in MEASURED},
        "srcc_interval": None,
        "published": {m: {metric: means[f"{m} {metric}"]["mean"] for metric in ("srcc", "plcc")} for m in models},
        "left_out": {name: mean["left_out"] for name, mean in means.items() if mean["left_out"]},
    }


# ---- as text


def as_text(rows: list[dict]) -> str:
    """Aligned columns for a terminal; the first one to the left, numbers to the right."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([*lines, *_notes(rows)])


def as_markdown(rows: list[dict]) -> str:
    """A table in GitHub's Markdown."""
    head, *body = _cells(rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
    return "\n\n".join([table, *_notes(rows)])


def _cells(rows: list[dict]) -> list[list[str]]:
    models = list(rows[0]["published"]) if rows else []
    head = ["data set", "scored", "SRCC", "PLCC", "PLCC fitted", "KRCC", "RMSE fitted", *models]
    return [head, *([*_measured(row), *(_pair(row, model) for model in models)] for row in rows)]


def _measured(row: dict) -> list[str]:
    low_high = row["srcc_interval"]
    between = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
    srcc, *others = (_number(row, name, row[name]) for name in MEASURED)
    return [row["dataset"], f"{row['scored']}/{row['listed']}", srcc + between, *others]


def _pair(row: dict, model: str) -> str:
    values = row["published"][model]
    if values["srcc"] is None and values["plcc"] is None:
        return "-"
    return "/".join(_number(row, f"{model} {metric}", values[metric]) for metric in ("srcc", "plcc"))


def _number(row: dict, column: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" + ("*" if column in row["left_out"] else "")


def _notes(rows: list[dict]) -> list[str]:
    """One line for each set of data sets that a mean leaves out, and in which columns."""
    notes = []
    for row in rows:
        columns: dict[tuple[str, ...], list[str]] = {}
        for column, names in row["left_out"].items():
            columns.setdefault(tuple(names), []).append(column)
        notes += [f"(*) {row['dataset']} without {', '.join(names)}: {', '.join(of)}" for names, of in columns.items()]
    return notes
