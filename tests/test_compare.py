"""Runs and evaluations side by side: figures, settings, pairs, seeds and curves against what was written."""

import dataclasses
import doctest
import json
import re
import statistics
from itertools import pairwise

import pytest

from grpo import charts, tables
from grpo.compare import compare, text
from grpo.config import Config
from tests.pages import Page, check, chromium, console
from tests.pages import tables as tables_of
from tests.results import measured, row, some_rows, write_csv, write_evaluation


def paired(scores, first, targets, metric):
    """Stands for the bootstrap: shows what it was given."""
    both = [(a, b, t) for a, b, t in zip(scores, first, targets, strict=True) if a is not None and b is not None]
    found = {"metric": metric, "videos": len(both), "left_out": 0}  # resamples
    if len(both) < 3:
        return found | {"difference": None, "interval": None, "p_value": None, "undefined": "too few"}
    difference = sum(a - b for a, b, _ in both) + (metric == "plcc")
    return found | {"difference": difference, "interval": [-0.5, 0.5], "p_value": 0.25, "undefined": None}


def step(number, terms=("regression", "ranking"), val=None, **fields):
    """A line of metrics.jsonl, as far as it is drawn."""
    rewards = {name: {"mean": 0.01 * number + k, "std": 0.1} for k, name in enumerate(terms)}
    found = {"step": number, "rewards": rewards, "reward": {"mean": 0.02 * number, "std": 0.1}}
    return found | {"kl": 0.001 * number, "entropy": 0.3, "length": 30.0 + number, "val": val} | fields


def write_run(folder, steps=(), rows=None, after=None, settings=(), **config):
    """A training run with settings as flags give them; `settings`: in the file as they are."""
    folder.mkdir(parents=True)
    saved = dataclasses.asdict(Config(**config)) | dict(settings)
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    if rows:
        write_csv(folder / "predictions.csv", ("path", "target", "score"), rows)
    if after:
        summary = {"before": after | {"srcc": 0.1}, "after": after, "best": {"step": 2, **after}, "settings": saved}
        (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


@pytest.fixture
def figures():
    return measured(some_rows(20))


def test_metrics_stand_side_by_side_and_what_is_missing_is_said(tmp_path, figures):
    undefined = figures | {"srcc": None, "undefined": {"srcc": "all scores are equal"}}
    of_old = figures | {"srcc": None, "plcc": None, "undefined": "all scores, or all MOS, are equal"}  # one for all
    runs = [
        write_run(tmp_path / "a", after=figures),
        write_run(tmp_path / "b", after=undefined, lr=1e-5),
        write_run(tmp_path / "c", after=of_old, lr=2e-5),
        write_run(tmp_path / "d", lr=3e-5),
    ]
    found = compare(runs, paired, tmp_path / "page.html")
    assert found["higher_is_better"]["srcc"] and not found["higher_is_better"]["rmse"]
    assert list(found["datasets"]) == ["test", "test before training", "best of the validations"]
    assert {name: metrics["srcc"] for name, metrics in found["datasets"]["test"].items()} == {
        runs[0]: 0.5, runs[1]: None, runs[2]: None
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    page = Page(tmp_path / "page.html")
    check(page)
    assert [line[1:4] for line in tables_of(page)["Metrics: test"]] == [
        ["scored", "SRCC ↑", "KRCC ↑"], ["18 of 20", "0.500", "0.600"], *[["18 of 20", "–", "0.600"]] * 2
    ]  # fmt: skip
    for said in (page.texts("li"), text(found).splitlines()):
        assert f"{runs[1]}: no SRCC: all scores are equal" in said
        assert f"{runs[2]}: no SRCC, PLCC: all scores, or all MOS, are equal" in said
        assert f"{runs[3]}: not measured" in said
    assert "learning" not in page.source.lower(), "no step, no curve"


def test_settings_that_differ_are_those_that_change_results(tmp_path, figures):
    runs = [
        write_run(tmp_path / "a", output="x", workers=3, lr=1e-5, settings={"old_flag": 1}),
        write_run(tmp_path / "b", output="y", save_every=7, lr=1e-5, beta=0.0),
    ]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    del config["sigma"], config["seed"]  # flags that are newer than the run: they had their defaults
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    found = compare(runs, paired)
    assert found["settings"] == {
        "training": {"old_flag": {runs[0]: 1, runs[1]: None}, "beta": {runs[0]: 0.04, runs[1]: 0.0}}
    }
    assert re.search(r"beta +0\.04 +0\.0$", text(found), re.MULTILINE)
    assert re.search(r"old_flag +1 +–$", text(found), re.MULTILINE)
    scoring = [{"score": "greedy"}, {"score": "expected"}]
    folders = [str(write_evaluation(tmp_path / f"e{k}", {"d": some_rows(9)}, scoring=s)) for k, s in enumerate(scoring)]
    found = compare([*folders, runs[0]], paired)
    assert found["settings"] == {"evaluation": {"score": {folders[0]: "greedy", folders[1]: "expected"}}}


def test_pairs_are_the_videos_that_both_have_in_one_order(tmp_path):
    rows = some_rows(30)
    others = [line | {"score": line["score"] and line["score"] / 2} for line in reversed(rows[3:])]
    others.append(row("new.mp4", 2, 2))
    others[4]["score"] = None
    folders = [str(write_evaluation(tmp_path / name, {"d": lines})) for name, lines in (("a", rows), ("b", others))]
    first, second = compare(folders, paired)["against_first"]
    mine = {line["path"]: line["score"] for line in others}
    both = [(mine[line["path"]], line["score"]) for line in rows[3:]]
    expected = [a - b for a, b in both if a is not None and b is not None]
    assert (first["folder"], first["first"], first["dataset"]) == (folders[1], folders[0], "d")
    assert [first["metric"], second["metric"]] == ["srcc", "plcc"]
    assert first["difference"] == pytest.approx(sum(expected)) and sum(expected) < -5
    assert second["difference"] == pytest.approx(sum(expected) + 1)
    assert first["videos"] == len(expected) < len(both)


def test_pairs_that_are_not_of_the_same_videos_are_left_out_with_the_reason(tmp_path, figures):
    rows = some_rows(12)
    moved = [line | {"target": "2.5"} if k < 2 else line for k, line in enumerate(rows)]
    sets = {"a": {"d": rows}, "moved": {"d": moved}, "others": {"d": [row("x.mp4", 3, 3)]}, "named": {"e": rows}}
    folders = [str(write_evaluation(tmp_path / name, lines)) for name, lines in sets.items()]
    folders.append(str(write_evaluation(tmp_path / "few", {"d": rows[:2]})))
    found = compare(folders, paired)
    assert [test.get("not_compared") for test in found["against_first"]] == [
        "2 of 12 shared videos have another MOS",
        "no shared video",
        f"{folders[3]} has no predictions of it",
        f"{folders[0]} has no predictions of it",
        None,
        None,
    ]
    shown = text(found)
    assert f"Not compared: {folders[1]}, d: 2 of 12 shared videos have another MOS" in shown
    assert f"{folders[4]}, d: no SRCC difference: too few" in shown
    assert re.search(rf"{folders[4]}, d +SRCC +2 +– +– +–$", shown, re.MULTILINE)
    runs = [write_run(tmp_path / "r", rows=rows, after=figures), write_run(tmp_path / "s", after=figures)]
    (left,) = compare(runs, paired)["against_first"]
    assert left["not_compared"] == f"{runs[1]} has no predictions of it"


def test_what_an_earlier_start_measured_is_not_that_of_a_run_begun_again(tmp_path, figures):
    rows = some_rows(12)
    runs = [write_run(tmp_path / name, rows=rows, after=figures) for name in ("a", "b")]
    assert len(compare(runs, paired)["against_first"]) == 2
    Config(steps=500, resume="auto", allow_changed="steps").save(tmp_path / "b" / "config.json")
    found = compare(runs, paired)
    assert {name: [*folders] for name, folders in found["datasets"].items()} == dict.fromkeys(
        ["test", "test before training", "best of the validations"], runs[:1]
    )
    assert found["settings"]["training"]["steps"] == {runs[0]: 250, runs[1]: 500}
    assert [test["not_compared"] for test in found["against_first"]] == [f"{runs[1]} has no predictions of it"]


def test_a_pair_is_shown_with_its_interval_p_value_and_number_of_videos(tmp_path):
    rows = some_rows(20)
    others = [line | {"score": line["score"] and line["score"] + 0.01} for line in rows]
    folders = [str(write_evaluation(tmp_path / name, {"d": lines})) for name, lines in (("a", rows), ("b", others))]
    compare(folders, paired, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert any("not corrected for their number" in note for note in page.texts("li"))
    assert any("not about other seeds" in note for note in page.texts("li"))
    shown = tables_of(page)[f"Paired bootstrap against {folders[0]}"]
    assert shown[0] == ["folder, data set", "metric", "videos", "difference", "interval", "p"]
    assert shown[1] == [f"{folders[1]}, d", "SRCC", "18", "+0.180", "[-0.500, +0.500]", "0.2500"]


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path, figures):
    def with_srcc(value):
        reason = {} if value else {"undefined": {"srcc": "all scores are equal"}}
        return figures | {"srcc": value} | reason

    same = {
        seed: write_run(tmp_path / f"s{seed}", after=with_srcc(v), seed=seed, output=f"o{seed}")
        for seed, v in enumerate((0.7, None, 0.8))
    }
    other = write_run(tmp_path / "other", after=figures, seed=4, lr=1e-5)
    again = [write_run(tmp_path / f"again{k}", after=figures, seed=0, beta=0.1) for k in range(2)]  # no other seed
    found = compare([other, *again, *same.values()], paired, tmp_path / "page.html")
    assert found["seeds"] == [{"folders": list(same.values()), "seeds": [0, 1, 2]}]
    page = Page(tmp_path / "page.html")
    header, test, *_ = tables_of(page)["Seeds of one setting"]
    assert header[:3] == ["data set", "seeds", "SRCC ↑"]
    assert test[:3] == ["test", "3", f"{statistics.mean([0.7, 0.8]):.3f} (0.700 to 0.800), 1 undefined"]
    assert any("seeds 0, 1, 2: " + ", ".join(same.values()) in note for note in page.texts("li"))


def test_curves_are_the_steps_that_were_written(tmp_path):
    undefined = {"srcc": None, "undefined": {"srcc": "all scores are equal"}}
    first = [step(k, val={"srcc": 0.1 * k} if k % 2 == 0 else None) for k in range(1, 5)]
    second = [step(k, ("regression", "format"), kl=None if k == 2 else 0.5, val=undefined) for k in range(1, 4)]
    third = [step(k, kl=0.0) for k in range(1, 3)]
    runs = [
        write_run(tmp_path / n, s, **c)
        for n, s, c in (("a", first, {}), ("b", second, {"lr": 1e-5}), ("c", third, {"beta": 0.0}))
    ]
    with (tmp_path / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # the run goes on
    compare(runs, paired, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    check(page)
    drawn = dict(zip(page.texts("strong"), (part.split("</svg>")[0] for part in page.source.split("<figure>")[1:])))
    terms = [f"reward: {name}" for name in ("regression", "ranking", "format")]
    assert list(drawn) == ["validation SRCC", "reward", *terms, "KL", "entropy", "length"]
    steps = {name: [points(line) for line in lines(svg)] for name, svg in drawn.items()}
    unit = (charts.RIGHT - charts.LEFT) / 3  # steps 1 to 4
    whole = [charts.LEFT + unit * k for k in range(4)]
    assert [[x for x, _ in line] for line in steps["length"]] == [pytest.approx(whole[:n], abs=0.06) for n in (4, 3, 2)]
    assert [len(line) for line in steps["validation SRCC"]] == [2]
    assert [[round((x - charts.LEFT) / unit) + 1 for x, _ in line] for line in steps["KL"]] == [[1, 2, 3, 4], [1, 3]]
    assert [len(line) for line in steps["reward: ranking"]] == [4, 2] and len(steps["reward: format"]) == 1
    heights = [charts.BOTTOM - y for _, y in steps["reward"][0]]
    assert [b - a for a, b in pairwise(heights)] == pytest.approx([heights[1] - heights[0]] * 3, abs=0.11)
    captions = dict(zip(drawn, page.texts("figcaption")))
    assert f"{runs[1]}: undefined at 3 of 3 steps: all scores are equal." in captions["validation SRCC"]
    assert f"{runs[1]}: undefined at 1 of 3 steps." in captions["KL"]
    assert f"{runs[2]}: none, as --beta 0 has no reference." in captions["KL"]
    looks = [
        re.search(r'stroke-\d" stroke-dasharray="[^"]+"', svg)[0]
        for svg in page.source.split("<li>")[1:]
        if "line of" in svg
    ]
    assert len(set(looks)) == len(looks) == 3
    assert re.findall(r'stroke-\d" stroke-dasharray="[^"]+"', drawn["length"]) == looks


def lines(svg):
    return re.findall(r'class="line [^>]* d="([^"]+)"', svg)


def points(d):
    return [tuple(map(float, point.split())) for point in d[1:].split("L")]


def test_a_long_run_is_drawn_in_means_that_are_owned_up_to(tmp_path):
    runs = [
        write_run(tmp_path / "long", [step(k) for k in range(1, 251)]),
        write_run(tmp_path / "short", [step(1)], lr=1e-5),
    ]
    compare(runs, paired, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    captions = dict(zip(page.texts("strong"), page.texts("figcaption")))
    assert "Every point is the mean of 3 steps." in captions["length"]
    (svg,) = [part for part in page.source.split("<svg")[1:] if "<title>length</title>" in part]
    long, short = (points(d) for d in lines(svg))
    assert len(long) == 84 and len(short) == 1
    axes = charts.Axes.around([(2.0, 32.0), (250.0, 280.0), (1.0, 31.0)])
    means = [(3 * k + 2, 30 + 3 * k + 2) for k in range(83)] + [(250, 280)]
    assert long == [(axes.px(x), axes.py(y)) for x, y in means]


def test_folders_that_cannot_be_compared_are_refused_by_name(tmp_path, figures):
    run = write_run(tmp_path / "a")
    for folders, named in (([run], "two or more"), ([run, run], "two or more"), ([run, str(tmp_path)], "neither")):
        with pytest.raises(ValueError, match=named):
            compare(folders, paired)
    torn = write_run(tmp_path / "torn", [step(1)])
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=re.escape(f"{torn}/metrics.jsonl:1: ")):
        compare([run, torn], paired)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "b" / "metrics.json"))):
        compare([run, str(tmp_path / "b")], paired)


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_a_browser_has_nothing_to_complain_of(tmp_path, figures):
    hostile = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    terms = ("regression", hostile)
    runs = [
        write_run(tmp_path / n, [step(k, terms) for k in (1, 2)], after=figures, system=s)
        for n, s in (("a", None), ("b", hostile))
    ]
    compare(runs, paired, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    check(page)
    assert hostile in page.texts("td") and f"reward: {hostile}" in page.texts("strong")
    lines, picture = console(tmp_path / "page.html", tmp_path, width=400)
    assert lines == [] and picture.startswith(b"\x89PNG")


def test_lines_of_many_runs_look_different():
    looks = [tuple(charts.style(k).values()) for k in range(charts.COLOURS * len(charts.DASHES))]
    assert len(set(looks)) == len(looks) and len({look for look, _ in looks[:8]}) == 8


def test_doctests():
    result = doctest.testmod(tables)
    assert result.attempted > 0 and result.failed == 0
