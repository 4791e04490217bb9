"""The page about a run: its numbers against slow readings of the run's files, its cases, its form."""

import doctest
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics

import pytest

import train
from data import synthetic
from grpo import run_report
from grpo.config import Config, parse_config
from grpo.curves import curves, scalars
from grpo.run_report import main, rows_of_step, write_run_report
from tests.pages import Page, check, chromium, console, tables
from tests.runs import PHASES, TERMS, answers, drawings, line, validation, write_run

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>{{ 7 * 7 }}'
SMALL = shlex.split("--steps 3 --videos-per-step 4 --group-size 3 --max-new-tokens 48 --workers 0 --eval-every 2")


def report(run, links=()):
    page = Page(write_run_report(run))
    check(page, links)
    return page


def lines(file):
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]


def slow_means(values, size):
    """Of the (step, value) of so many neighbours."""
    return [
        (statistics.mean(step for step, _ in values[k : k + size]), statistics.mean(v for _, v in values[k : k + size]))
        for k in range(0, len(values), size)
    ]


def same(drawn, values, unit):
    """Whether points are where they belong, as exactly as a drawing with one decimal has them."""
    assert len(drawn) == len(values) > 0
    for found, wanted in zip(drawn, values):
        assert all(abs(a - b) < 0.06 * u + 1e-9 for a, b, u in zip(found, wanted, unit)), (found, wanted)
    return True


def expected(rows):
    """Title -> line -> (step, value), written out for each."""
    shown = {
        "validation": {
            "SRCC": [(row["step"], row["val"]["srcc"]) for row in rows if row["val"]],
            "PLCC": [(row["step"], row["val"]["plcc"]) for row in rows if row["val"]],
        },
        "reward": {"": [(row["step"], row["reward"]["mean"]) for row in rows]},
        "spread of rewards": {"weighted sum": [(row["step"], row["reward"]["std"]) for row in rows]},
        "unparsed": {
            "": [(row["step"], (row["unparsed"]["empty"] + row["unparsed"]["no_answer"]) / 32) for row in rows]
        },
        "clipped": {
            "low": [(row["step"], row["clipped_low"]) for row in rows],
            "high": [(row["step"], row["clipped_high"]) for row in rows],
        },
    }
    for name in rows[0]["rewards"]:
        shown[f"reward: {name}"] = {"": [(row["step"], row["rewards"][name]["mean"]) for row in rows]}
        shown["spread of rewards"][name] = [(row["step"], row["rewards"][name]["std"]) for row in rows]
    fields = {"KL": "kl", "score spread": "score_std", "zero variance": "zero_variance", "gradient norm": "grad_norm"}
    fields |= {"entropy": "entropy", "length": "length", "truncated": "truncated", "learning rate": "lr"}
    for title, field in (fields | {"speed": "tokens_per_s"}).items():
        shown[title] = {"": [(row["step"], row[field]) for row in rows]}
    return shown


@pytest.fixture
def long(tmp_path):
    rows = [line(k, val=validation(k / 300, k / 400) if k % 50 == 0 else None) for k in range(1, 251)]
    return write_run(tmp_path / "long", rows)


def test_points_are_those_of_a_slow_reading(long):
    page, wanted = report(long), expected(lines(long / "metrics.jsonl"))
    found = drawings(page)
    assert set(found) == {*wanted, "time of a step"}
    captions = dict(zip(found, page.texts("figcaption")))
    for title, of_lines in wanted.items():
        assert set(found[title].lines) == set(of_lines), title
        size = 1 if title == "validation" else 3
        assert ("Every point is the mean of 3 steps." in captions[title]) == (size == 3)
        for name, values in of_lines.items():
            assert same(found[title].lines[name], slow_means(values, size), found[title].unit), (title, name)


def test_dots_are_the_steps_and_what_is_beyond_is_told(long):
    page, wanted = report(long), expected(lines(long / "metrics.jsonl"))
    captions, beyond = dict(zip(drawings(page), page.texts("figcaption"))), {}
    for title, drawn in drawings(page).items():
        if title in ("validation", "spread of rewards", "time of a step"):
            assert drawn.dots == []
            continue
        low, high = drawn.ends
        outside = [(max(low - v, v - high), step, v) for of in wanted[title].values() for step, v in of]
        outside = [entry for entry in outside if entry[0] > 0]
        for dots, values in zip(drawn.dots, wanted[title].values(), strict=True):
            assert same(dots, [(step, v) for step, v in values if low <= v <= high], drawn.unit)
        told = re.search(r"Dots not drawn: (\d+), the farthest ([\d.e+-]+) at step (\d+)\.", captions[title])
        beyond[title] = len(outside)
        assert (told is not None) == bool(outside), title
        if told:
            _, step, value = max(outside)
            assert (int(told[1]), told[2], int(told[3])) == (len(outside), f"{value:.3g}", step)
    assert 0 < beyond["gradient norm"] <= 2 * 2 and beyond["clipped"] == 0, "heavy tails do not stretch the axis"


@pytest.mark.parametrize("rate", [9.1e-4, 0.1])
def test_what_never_changes_is_one_level_whatever_its_means_round_to(tmp_path, rate):
    page = report(write_run(tmp_path / "a", [line(k, lr=rate) for k in range(1, 251)]))
    drawn = drawings(page)["learning rate"]
    assert drawn.ends[1] - drawn.ends[0] >= 1
    assert [value for _, value in drawn.lines[""]] == pytest.approx([rate] * 84, abs=drawn.unit[1])


def test_areas_are_the_seconds_of_the_phases(long):
    rows, page = lines(long / "metrics.jsonl"), report(long)
    drawn, below = drawings(page)["time of a step"], [0.0] * 84
    assert list(drawn.areas) == [*reversed(PHASES)]
    for name in PHASES:
        means = slow_means([(row["step"], row["phase_s"][name]) for row in rows], 3)
        below = [low + mean for low, (_, mean) in zip(below, means)]
        assert same(drawn.areas[name], [(step, top) for (step, _), top in zip(means, below)], drawn.unit)
    seconds = {name: sum(row["phase_s"][name] for row in rows) for name in PHASES}
    whole = sum(seconds.values())
    assert tables(page)["Where the time went"][1:] == [
        [name, f"{seconds[name]:.1f}", f"{100 * seconds[name] / whole:.1f} %"] for name in PHASES
    ]


def test_more_phases_than_colours_leave_the_smallest_in_one_area(tmp_path):
    names = [f"phase{k}" for k in range(10)]
    rows = [line(k, phase_s={name: 0.1 * (p + 1) for p, name in enumerate(names)}) for k in (1, 2)]
    rows[1]["phase_s"]["inspect"] = 5.0
    drawn = drawings(report(write_run(tmp_path / "a", rows)))["time of a step"]
    assert list(drawn.areas) == ["phase0, phase1, phase2, phase3", "inspect", *reversed(names[4:])]
    assert [y for _, y in drawn.areas["phase0, phase1, phase2, phase3"]] == pytest.approx([5.5, 10.5], abs=0.05)


def test_scalars_are_all_numbers_of_a_line():
    row = line(7, val=validation(None, 0.5, undefined={"srcc": "equal"}))
    found = scalars(row, {"beta": 0.04})
    apart = {"step", "val", "rewards", "reward", "phase_s", "unparsed"}
    slow = {name: value for name, value in row.items() if name not in apart}
    slow |= {"val/srcc": None, "val/plcc": 0.5, "val/scored": 9, "val/listed": 9}
    slow |= {f"reward/{part}": value for part, value in row["reward"].items()}
    slow |= {f"rewards/{name}/{part}": row["rewards"][name][part] for name in TERMS for part in ("mean", "std")}
    slow |= {f"phase_s/{name}": row["phase_s"][name] for name in PHASES}
    slow |= {f"unparsed/{name}": row["unparsed"][name] for name in ("empty", "no_answer")}
    slow["unparsed/share"] = sum(row["unparsed"].values()) / 32
    assert found == slow
    assert slow.keys() - scalars(row, {"beta": 0.0}).keys() == {"kl"}
    assert not [name for name in scalars(line(7), {}) if name.startswith("val")]


def test_runs_are_compared_by_the_same_numbers(long):
    rows = lines(long / "metrics.jsonl")[:90]
    results = {name: {"settings": {"beta": 0.04}, "steps": steps} for name, steps in (("a", rows), ("b", rows[:30]))}
    found = {chart["title"]: chart["lines"] for chart in curves(results)}
    wanted = expected(rows)
    del wanted["spread of rewards"]
    flat = {title if not name else f"{title} {name}": v for title, of in wanted.items() for name, v in of.items()}
    assert set(found) == set(flat)
    for title, values in flat.items():
        assert [one["points"] for one in found[title]] == [
            points for points in (values, [v for v in values if v[0] <= 30]) if points
        ]


# ---- answers


def test_lines_of_a_step_are_found_without_reading_the_others(tmp_path, monkeypatch):
    rng = random.Random(0)
    for trial in range(20):
        steps = sorted(rng.choices(range(1, 12), k=rng.randrange(40)))
        rows = [{"step": step, "k": k, "text": "ü\u2028\n" * rng.randrange(30)} for k, step in enumerate(steps)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = tmp_path / f"{trial}.jsonl"
        file.write_bytes(text.encode() + b'{"step": 11, "tex' * (trial % 2))
        for step in range(13):
            assert rows_of_step(file, step) == [row for row in rows if row["step"] == step]
    file.write_text("".join(f'{{"step": {k // 4}, "text": "{"x" * 500}"}}\n' for k in range(20000)))
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or loads(text))
    for step in (0, 1, 2500, 4999):
        read.clear()
        assert len(rows_of_step(file, step)) == 4 and len(read) < 60


def test_a_line_that_is_no_json_is_named(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text('{"step": 1}\n{"step":\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}: the line that ends at byte 21: ")):
        rows_of_step(file, 2)


def test_shown_answers_are_the_best_the_median_and_the_worst(tmp_path):
    marks = {"b.mp4": 5.0, "e.mp4": 2.0, "a.mp4": 3.0, "d.mp4": 1.0, "c.mp4": 4.0}
    rollouts = [row for step in range(1, 8) for path, mos in marks.items() for row in answers(step, path, mos)]
    page = report(write_run(tmp_path / "run", [line(k) for k in range(1, 8)], rollouts))
    assert re.findall(r"<h3>Step (\d+)</h3>", page.source) == ["1", "4", "7"]
    found, texts = tables(page), []
    for step in (1, 4, 7):
        for path in ("d.mp4", "a.mp4", "b.mp4"):
            group = [row for row in rollouts if (row["step"], row["video"]) == (step, path)]
            ranks = {sum(other["reward"] > row["reward"] for other in group): row for row in group}
            chosen = [ranks[0], ranks[2], ranks[4]]
            shown = dict((name, cells) for name, *cells in found[f"Step {step}, {path}: 3 of 5 answers"])
            assert shown[""] == ["best", "median", "worst"]
            assert shown["score"] == [f"{row['score']:.2f}" if row["score"] else "–" for row in chosen]
            assert shown["reward"] == [f"{row['reward']:.3f}" for row in chosen]
            assert shown["advantage"] == [f"{row['advantage']:+.3f}" for row in chosen]
            for name in TERMS:
                assert shown[name] == [f"{row['rewards'][name]:.3f}" for row in chosen]
            names = zip(("best", "median", "worst"), chosen)
            texts += [
                (name + (", unreadable: not_a_number" if row["unparsed"] else ""), row["text"]) for name, row in names
            ]
    below = page.source.split('id="answers"')[1]
    parts = re.findall(r'<p class="note">(.*?)</p>\s*<blockquote dir="auto">(.*?)</blockquote>', below)
    assert parts == texts
    assert any("unreadable" in name for name, _ in texts) and len(texts) == 27


@pytest.mark.parametrize(("number", "names"), [(1, ["the only one"]), (2, ["best", "worst"])])
def test_small_groups_and_long_answers(tmp_path, number, names):
    rollouts = answers(1, "a.mp4", 3.0, number) + answers(1, "b.mp4", 4.0, number)
    rollouts[0]["text"] = "long " * 400
    page = report(write_run(tmp_path / "run", [line(1)], rollouts))
    assert tables(page)[f"Step 1, b.mp4: {number} of {number} answers"][0][1:] == names
    assert page.texts("summary").count("2,000 characters") == 1
    assert len(page.texts("blockquote")) == 2 * number


# ---- runs of every kind


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    labels = synthetic.write_clips(folder, {"train": 9, "val": 4, "test": 5}, seed=11)
    return ["--labels", str(labels), "--videos", str(folder)]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "real"
    assert train.main(parse_config([*SMALL, *data, "--output", str(run), "--inspect", "2"])) == 0
    return run


def test_a_real_run_ends_with_its_page(finished):
    page, summary = Page(finished / "report.html"), json.loads((finished / "summary.json").read_text())
    check(page, ["inspect/step_000002.html"])
    assert page.texts("pre") == [summary["command"]] and page.texts("h1") == ["Training run real"]
    facts = dict(zip(page.texts("dt"), page.texts("dd")))
    assert facts["steps"] == "3 of 3" and facts["processes"] == "1" and "torch 2." in facts["versions"]
    for name in ("srcc", "plcc"):
        gain = f"{summary['before'][name]:.3f} → {summary['after'][name]:.3f}"
        assert facts[f"test {name.upper()}, before and after"] == gain
    header, *rows = tables(page)["Measured"]
    assert header[:3] == ["split", "scored", "SRCC ↑"]
    step = summary["best"]["step"]
    for row, name in zip(rows, ("before", "best", "after"), strict=True):
        assert row[1:3] == [f"{summary[name]['scored']} of {summary[name]['listed']}", f"{summary[name]['srcc']:.3f}"]
    assert [row[0] for row in rows][1:] == [
        f"best of the validations, step {step}",
        f"test after training, model of step {step}",
    ]
    assert len(drawings(page)) == 19, "14 charts of any run, time, and 4 terms"
    flags = {row[0]: row[1:] for row in tables(page)["Settings that are not those of --preset tiny"][1:]}
    assert flags["--steps"] == ["3", "250"] and flags["--inspect"] == ["2", "–"] and "--lr" not in flags
    assert "All that happened in it" in page.texts("a") and "step 2" in page.texts("a")
    assert len(re.findall("<h3>Step [123]</h3>", page.source)) == 3
    assert page.source.count("none.</li>") == 3, "health: nothing to tell"
    before = (finished / "report.html").read_bytes()
    assert main([str(finished)]) == 0 and (finished / "report.html").read_bytes() == before


@pytest.mark.parametrize("by", ["a signal", "a video"])
def test_a_run_that_is_stopped_has_its_page_too(data, finished, tmp_path, monkeypatch, by):
    videos, output = tmp_path / "clips", tmp_path / "run"
    shutil.copytree(data[3], videos)
    first, second = ({row["video"] for row in lines(finished / "rollouts.jsonl") if row["step"] == k} for k in (1, 2))
    bad = min(second - first)
    if by == "a video":
        (videos / bad).write_text("not a video")
    else:
        monkeypatch.setattr(train, "better", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    flags = ["--labels", data[1], "--videos", str(videos), "--output", str(output), "--max-bad-videos", "0"]
    assert train.main(parse_config([*SMALL, *flags])) == {"a video": 2, "a signal": 128 + signal.SIGTERM}[by]
    page = Page(output / "report.html")
    check(page)
    facts = dict(zip(page.texts("dt"), page.texts("dd")))
    assert facts["steps"] == "1 of 3" and facts["processes"] == "1" and "versions" not in facts
    said = [text for text in page.texts("li") if text.startswith("The run has not finished: there is no summary.json")]
    assert len(said) == 1 and page.texts("pre") == []
    assert [row[0] for row in tables(page)["Measured"]] == ["split", "test before training"], "the checkpoint knows it"
    listed = tables(page).get("Videos that could not be read, and were replaced", [])[1:]
    assert [row[:3] for row in listed] == ([[bad, "2", "unreadable"]] if by == "a video" else [])


def test_a_page_that_cannot_be_written_loses_nothing(data, tmp_path, monkeypatch, capsys):
    def fail(run):
        raise OSError("no space left")

    monkeypatch.setattr(train, "write_run_report", fail)
    run = tmp_path / "run"
    assert train.main(parse_config([*SMALL, *data, "--output", str(run), "--steps", "1"])) == 0
    said = capsys.readouterr()
    assert f"no {run / 'report.html'}: no space left" in said.err and "after training:" in said.out
    assert (run / "summary.json").exists() and not (run / "report.html").exists()


def test_what_was_not_measured_is_said(tmp_path):
    rows = [line(k) for k in (1, 2)]
    page = report(write_run(tmp_path / "a", rows, summary={}, beta=0.0, resume="auto"))
    notes = page.texts("li")
    assert "No test: the label file has no split 'test'." in notes
    assert "No validation: the label file has no split 'val', or no step was --eval-every's." in notes
    assert "With --resume the command is that of the last start, which need not be the first." in notes
    assert "Measured" not in tables(page) and not page.of("dl")[0].get("class")
    absent = [text for text in page.texts("p") if text.startswith(("validation", "KL"))]
    assert absent == ["validation: no step was validated.", "KL: none, as --beta 0 has no reference."]
    assert not {"validation", "KL"} & set(drawings(page))
    assert page.texts("p").count("rollouts.jsonl has no answers of this step.") == 2
    (tmp_path / "a" / "rollouts.jsonl").unlink()
    assert "There is no rollouts.jsonl: no answers are shown." in report(tmp_path / "a").texts("li")


def test_undefined_numbers_have_their_reason(tmp_path):
    undefined = validation(None, None, undefined={"srcc": "all scores are equal", "plcc": "all scores are equal"})
    rows = [line(k, val=undefined, score_std=None if k > 1 else 0.5) for k in (1, 2, 3)]
    page = report(write_run(tmp_path / "a", rows, summary={"before": undefined, "after": undefined}))
    why = "undefined at 3 of 3 steps: all scores are equal."
    (shown,) = [text for text in page.texts("p") if text.startswith("validation")]
    assert shown == f"validation: Higher is better. SRCC: {why} PLCC: {why}"
    assert "No best validation: none had an SRCC." in page.texts("li")
    assert "test before training: no SRCC, PLCC: all scores are equal" in page.texts("li")
    assert [text for text in page.texts("dd") if "→" in text] == ["– → –"] * 2
    captions = dict(zip(drawings(page), page.texts("figcaption")))
    assert "score spread: undefined at 2 of 3 steps." in captions["score spread"]
    assert "undefined" not in captions["entropy"]


def test_a_line_whose_neighbour_is_undefined_keeps_its_name(tmp_path):
    rows = [line(k, val=validation(0.1 * k, None, undefined={"plcc": "why not"})) for k in (1, 2)]
    page = report(write_run(tmp_path / "a", rows))
    assert list(drawings(page)["validation"].lines) == ["SRCC"]
    assert "PLCC: undefined at 2 of 2 steps: why not." in page.texts("figcaption")[0]


def test_a_run_of_one_step_and_one_of_none(tmp_path):
    page = report(write_run(tmp_path / "one", [line(1)], answers(1, "a.mp4", 2.0), steps=9))
    assert all(len(points) == 1 for drawn in drawings(page).values() for points in drawn.lines.values())
    assert dict(zip(page.texts("dt"), page.texts("dd")))["steps"] == "1 of 9"
    page = report(write_run(tmp_path / "none"))
    assert "No step is done yet." in page.texts("p") and drawings(page) == {}
    assert "It has no checkpoint yet: the test before training is not known either." in page.texts("li")


def test_a_summary_of_an_earlier_start_is_not_used(tmp_path):
    run = write_run(tmp_path / "a", [line(1), line(2)], summary={"before": validation(0.1, 0.2)}, steps=1)
    assert [text for text in report(run).texts("pre")] == ["python train.py"]
    again = Config(steps=5, resume="auto", allow_changed="steps")
    again.save(run / "config.json")
    state = run / "checkpoints" / "step_000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"step": 2, "before": validation(0.3, 0.4), "processes": 2}))
    page = report(run)
    assert page.texts("pre") == [] and dict(zip(page.texts("dt"), page.texts("dd")))["processes"] == "2"
    assert tables(page)["Measured"][1][:3] == ["test before training", "9 of 9", "0.300"]
    assert dict(zip(page.texts("dt"), page.texts("dd")))["steps"] == "2 of 5"


def test_the_best_validation_of_a_run_that_goes_on_is_the_first_of_the_highest(tmp_path):
    values = {2: 0.5, 4: 0.8, 6: None, 8: 0.8, 10: 0.7}
    rows = [line(k, val=validation(values[k], k / 100) if k in values else None) for k in range(1, 11)]
    shown = tables(report(write_run(tmp_path / "a", rows)))["Measured"][1:]
    assert shown == [["best of the validations, step 4", "9 of 9", "0.800", "0.040"]]


def test_trouble_is_listed(tmp_path):
    rows = [line(k, truncated=0.5 if k > 12 else 0.0, skipped=1 if k in (3, 4) else 0) for k in range(1, 41)]
    bad = [{"step": k, "index": k, "path": f"{k}.mp4", "reason": "unreadable", "detail": HOSTILE} for k in range(12)]
    run = write_run(tmp_path / "a", rows, bad_videos=bad)
    (run / "bad_step_000004.json").write_text("{}")
    page = report(run)
    found = [text for text in page.texts("li") if "(truncated)" in text or "left out" in text or "(skipped)" in text]
    level = [statistics.median(row["truncated"] for row in rows[max(0, k - 10) : k]) for k in range(1, 41)]
    first = next(k for k, value in enumerate(level, 1) if value > 0.2)
    times = sum(value > 0.2 for value in level)
    assert found[0].startswith("1 updates left out") and "first at step 3, at 2 of 40 steps" in found[0]
    assert found[1].endswith(f"(truncated): first at step {first}, at {times} of 40 steps.")
    assert "not finite: 3, 4. The last of several in a row: bad_step_000004.json." in found[2]
    assert tables(page)["Videos that could not be read, and were replaced"][1:] == [
        [row["path"], str(row["step"]), "unreadable", HOSTILE] for row in bad
    ]
    rows = [line(k, skipped=1) for k in range(1, 26)]
    assert ", 20 and 5 more." in " ".join(report(write_run(tmp_path / "b", rows)).texts("li"))


def test_all_settings_are_listed(tmp_path):
    run = write_run(tmp_path / "a", [line(1)])
    page = report(run)
    assert "All are those of the preset." in page.texts("p")
    settings = json.loads((run / "config.json").read_text())
    listed = dict(zip(page.texts("dt"), page.texts("dd")))
    for name, value in settings.items():
        assert listed["--" + name.replace("_", "-")] == ("–" if value is None else str(value))
    large = write_run(tmp_path / "b", [line(1)], preset="internvl3-8b", lr=1e-6, kl="k1", labels="l", videos="v")
    flags = {row[0]: row[1:] for row in tables(report(large))["Settings that are not those of --preset internvl3-8b"]}
    assert flags["--kl"] == ["k1", "k3"] and flags["--steps"] == ["250", "2630"]
    assert "--lr" not in flags and flags["--labels"] == ["l", "–"]


def hostile_run(folder):
    rollouts = [
        row | {"text": f"é {HOSTILE}", "unparsed": HOSTILE} for row in answers(1, HOSTILE, 2.0, terms=[HOSTILE])
    ]
    rows = [line(k, (HOSTILE,)) for k in (1, 2)]
    return write_run(folder, rows, rollouts, summary={"command": HOSTILE}, system=HOSTILE)


def test_text_from_outside_stays_text(tmp_path):
    page = report(hostile_run(tmp_path / "<b>run"))
    assert page.texts("blockquote") == [f"é {HOSTILE}"] * 3 and page.texts("pre") == [HOSTILE]
    assert page.texts("h1") == ["Training run <b>run"] and f"reward: {HOSTILE}" in page.texts("strong")
    assert f"Step 1, {HOSTILE}: 3 of 5 answers" in tables(page) and page.texts("dd").count(HOSTILE) == 1
    assert page.of("img") == []


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_has_nothing_to_complain_of(tmp_path, width):
    said, picture = console(write_run_report(hostile_run(tmp_path / "run")), tmp_path, width)
    assert said == [] and picture.startswith(b"\x89PNG")


def test_folders_that_hold_no_run_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path)])
    assert exit_.value.code == 2 and f"error: {tmp_path}: not a training run" in capsys.readouterr().err
    run = write_run(tmp_path / "a", [line(1)])
    (run / "metrics.jsonl").write_text('{"step": 1\n')
    with pytest.raises(ValueError, match=re.escape(f"{run / 'metrics.jsonl'}:1: ")):
        write_run_report(run)


def test_doctests():
    result = doctest.testmod(run_report)
    assert result.attempted > 0 and result.failed == 0
