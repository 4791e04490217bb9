"""evaluate.py: files that cannot be scored, the command line."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from scipy import stats

import evaluate
from data import label_tool, synthetic
from data.benchmarks import BENCHMARKS
from data.labels import Clip, read_labels, write_labels
from data.recipe import Recipe
from grpo import checkpoint, distributed
from grpo.config import TINY_MODEL
from grpo.results import read_predictions
from models import scorer
from models.checkpoints import MOTION_RECIPES
from models.loading import PRECISIONS, load_policy, save_policy
from models.scorer import Scorer, load_scorer
from models.slowfast import RECIPES, SlowFastConfig
from rewards.metrics import paired_bootstrap
from tests import pages
from tests.helpers import motion_policy, tiny_policy
from tests.test_benchmarks import LISTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four good clips and, in the middle, one that is no video."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    synthetic.write_clips(folder, {"test": 4}, seed=3)
    (folder / "broken, really.mp4").write_bytes(b"not a video")
    good = [Clip(f"test/{k:05d}.mp4", 20.0 * (k + 1), (0.0, 100.0), "d", "test") for k in range(4)]
    write_labels(
        [*good[:2], Clip("broken, really.mp4", 50.0, (0.0, 100.0), "d", "test"), *good[2:]], folder / "l.jsonl"
    )
    return folder


def run(capsys, *arguments):
    try:
        code = evaluate.main(evaluate.parse_arguments([str(a) for a in arguments]))
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_a_list_is_scored_and_what_has_no_score_says_why(clips, tmp_path, capsys):
    flags = ["--labels", clips / "l.jsonl", "--videos", clips]
    outputs = [tmp_path / "a", tmp_path / "b"]
    assert run(capsys, *flags, "--output", outputs[0])[0] == 0
    assert run(capsys, *flags, "--output", outputs[1], "--strict")[0] == 1
    texts = [(output / "d" / "predictions.csv").read_text() for output in outputs]
    assert texts[0] == texts[1], "greedy scores must repeat"
    rows = list(csv.DictReader(texts[0].splitlines()))
    columns = ["path", "mos", "target", "score", "spread", "status", "reason", "flags", "reasoning", "answers", "mass"]
    assert list(rows[0]) == [*columns, "scale"]
    assert {row["scale"] for row in rows} == {"1 (bad) to 5 (excellent), higher is better"}
    assert [float(row["mos"]) for row in rows] == [20, 40, 50, 60, 80]
    assert [float(row["target"]) for row in rows] == pytest.approx([1.8, 2.6, 3.0, 3.4, 4.2])
    broken = rows.pop(2)
    assert (broken["path"], broken["score"], broken["status"]) == ("broken, really.mp4", "", "unreadable")
    assert broken["reason"]
    assert all(
        row["status"] == "ok" and 1 <= float(row["score"]) <= 5 and "video is" in row["reasoning"] for row in rows
    )
    metrics = json.loads((outputs[0] / "metrics.json").read_text())
    assert (metrics["mos_range"], metrics["higher_is_better"]) == ([1, 5], True)
    figures = metrics["datasets"]["d"]
    assert figures["coverage"] == 0.8 and sum(figures["failures"].values()) == 1
    x, y = zip(*[(float(row["score"]), float(row["target"])) for row in rows])
    assert figures["srcc"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_report_shows_what_was_scored(clips, tmp_path, capsys):
    flags = ["--labels", clips / "l.jsonl", "--videos", clips, "--output", tmp_path / "out"]
    code, out, _ = run(capsys, *flags, "--report", tmp_path / "pages" / "report.html")
    assert code == 0 and f"{tmp_path / 'pages' / 'report.html'}: 0." in out
    page = pages.Page(tmp_path / "pages" / "report.html")
    pages.check(page)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["datasets"]["d"]
    assert pages.tables(page)["Metrics of each data set"][1][:2] == ["d", "4 of 5"]
    assert f"{metrics['rmse']:.3f}" in pages.tables(page)["Metrics of each data set"][1][6]
    assert sorted(page.texts("strong")[::2]) == [f"test/{k:05d}.mp4" for k in range(4)]
    assert len(page.of("img")) == 4 * 6  # the recipe's frames
    assert "broken, really.mp4" in page.texts("details")[-1]


def test_evaluations_are_compared_without_a_model(clips, tmp_path, capsys, monkeypatch):
    flags = ["--labels", clips / "l.jsonl", "--videos", clips]
    outputs = [tmp_path / "a", tmp_path / "b"]
    run(capsys, *flags, "--output", outputs[0])
    run(capsys, *flags, "--output", outputs[1], "--score", "expected")
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("a model was loaded"))
    code, out, _ = run(capsys, "--compare", *outputs, "--report", tmp_path / "page.html")
    assert code == 0 and re.search(r"score +greedy +expected$", out, re.MULTILINE)
    pages.check(pages.Page(tmp_path / "page.html"))
    found = json.loads(run(capsys, "--compare", *outputs, "--json")[1])
    scores = [[row["score"] for row in read_predictions(output / "d" / "predictions.csv")] for output in outputs]
    targets = [row["target"] for row in read_predictions(outputs[0] / "d" / "predictions.csv")]
    expected = paired_bootstrap(scores[1], scores[0], targets, "srcc")
    assert {name: found["against_first"][0][name] for name in expected} == expected and expected["videos"] == 4
    code, _, err = run(capsys, "--compare", outputs[0], tmp_path)
    assert code == 2 and f"{tmp_path}: neither an evaluation" in err and "\n" not in err.strip()


def test_faulty_videos_are_listed_with_what_is_wrong(clips, tmp_path, capsys):
    """Cut short: scored from what is left, and flagged. Missing, or too slow to decode: no score, and the reason."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    cut = folder / "test" / "cut.mkv"
    with av.open(str(folder / "test" / "00000.mp4")) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    paths = ["test/00001.mp4", "test/cut.mkv", 'test/a, "missing" 🎬.mp4']
    write_labels([Clip(path, 50.0, (0.0, 100.0), "d", "test") for path in paths], folder / "l.jsonl")
    flags = ["--labels", folder / "l.jsonl", "--videos", folder, "--output", tmp_path / "out"]
    code, _, err = run(capsys, *flags)
    assert code == 0 and "1 of 3 videos are missing" in err
    with open(tmp_path / "out" / "d" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == paths
    assert [(row["status"], row["reason"], row["flags"]) for row in rows] == [
        ("ok", "", ""), ("ok", "", "truncated"), ("unreadable", "missing", "")
    ]  # fmt: skip
    assert [row["score"] == "" for row in rows] == [False, False, True]

    code, out, _ = run(capsys, "--video", folder / "test" / "00001.mp4", "--video-timeout", "0.00001")
    assert code == 1 and "no score (unreadable: timeout)" in out


def test_one_video_prints_reasoning_and_score(clips, capsys):
    code, out, _ = run(capsys, "--video", clips / "test" / "00001.mp4")
    assert code == 0 and "video is" in out and "score: " in out and "1 (bad) to 5 (excellent)" in out
    code, out, _ = run(capsys, "--video", clips / "test" / "00001.mp4", "--json")
    told = json.loads(out)
    assert code == 0 and 1 <= told["score"] <= 5 and told["status"] == "ok" and told["reasoning"]
    code, out, _ = run(capsys, "--video", clips / "broken, really.mp4")
    assert code == 1 and "no score (unreadable)" in out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--video"),
        (["--labels", "x"], "--videos"),
        (["--video", "x", "--labels", "y"], "--labels"),
        (["--video", "x", "--model", "./nowhere"], "--model"),
        (["--video", "x", "--frames", "0"], "--frames"),
        (["--video", "x", "--report", "y"], "--report"),
        (["--video", "x", "--split", "val"], "--split val"),
        (["--compare", "x", "--video", "y"], "--compare"),
        (["--compare", "x"], "--compare"),
        (["--compare", "nowhere", "elsewhere"], "nowhere: neither"),
        (["--compare", "x", "y", "--strict"], "--strict: goes without --compare"),
        (["--compare", "x", "y", "--model", "./z"], "--model: goes without --compare"),
        (["--compare", "x", "y", "--samples", "8", "--seed", "1"], "--samples: goes without --compare"),
        (["--compare", "x", "y", "--batch", "4"], "--batch: goes without --compare"),
        (["--video", "x", "--video-timeout", "0"], "--video-timeout"),
        (["--video", "x", "--video-timeout", "inf"], "--video-timeout"),
        (["--labels", "nowhere.jsonl", "--videos", ".", "--output", "out"], "nowhere.jsonl"),
    ],
)
def test_wrong_flags_are_named_in_one_line(capsys, flags, named):
    code, _, err = run(capsys, *flags)
    assert code == 2 and named in err and "\n" not in err.strip()


def test_help_through_the_shell():
    done = subprocess.run([sys.executable, "evaluate.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--strict" in done.stdout and "143 by SIGTERM" in done.stdout


def test_the_number_of_frames_is_set_with_slowfasts_settings(clips, tmp_path, capsys):
    save_policy(motion_policy(frames=12), tmp_path)  # slow_stride 4
    flags = ["--model", tmp_path, "--video", clips / "test" / "00001.mp4", "--json"]
    code, out, _ = run(capsys, *flags, "--frames", "12", "--motion-recipe", "test")
    assert json.loads(out)["status"] in ("ok", "unparsed")
    code, _, err = run(capsys, *flags, "--frames", "12", "--motion-recipe", "train")
    assert (
        code == 2 and "--frames 12: slow_stride 3: of 12 frames the slow path has 4" in err and "\n" not in err.strip()
    )
    code, _, err = run(capsys, *flags[2:], "--motion-recipe", "test")  # the tiny model, with the 6 frames of its recipe
    assert code == 2 and "--frames 6: slow_stride 4: of 6 frames the slow path has 1" in err
    save_policy(tiny_policy(), tmp_path / "internvl")
    code, _, err = run(capsys, *flags[2:], "--model", tmp_path / "internvl", "--motion-recipe", "test")
    assert code == 2 and "--motion-recipe: --model" in err and "has no motion token" in err


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_video_is_scored_in_the_precision_asked_for(clips, capsys, monkeypatch, precision):
    loaded = []
    monkeypatch.setattr(scorer, "load_policy", lambda *a, **k: loaded.append(load_policy(*a, **k)) or loaded[-1])
    code, out, _ = run(capsys, "--video", clips / "test" / "00000.mp4", "--precision", precision, "--json")
    assert code == 0 and 1 <= json.loads(out)["score"] <= 5
    (policy,) = loaded
    assert (next(policy.parameters()).dtype, policy.autocast_dtype) == PRECISIONS[precision]


def test_a_recipe_says_whether_slowfast_sees_dense_clips(clips, tmp_path, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(scorer, "load_policy", lambda *a, **k: loaded.append(load_policy(*a, **k)) or loaded[-1])
    save_policy(motion_policy(slow_stride=4), tmp_path)
    flags = ["--model", tmp_path, "--video", clips / "test" / "00001.mp4", "--json"]
    short = {"frames": 3, "max_new_tokens": 4}
    for fields in ({"motion_clips": 1}, {"motion_clips": 2}, {"motion_clips": 0}, {}):  # none in a recipe of before
        (tmp_path / "recipe.json").write_text(json.dumps(short | fields))
        code, out, err = run(capsys, *flags)
        if fields.get("motion_clips"):
            assert json.loads(out)["status"] in ("ok", "unparsed")
            settings = loaded[-1].model.model.slowfast.config
            assert (settings.slow_stride, settings.temporal_repeat) == (4, 1)
        else:
            assert code == 2 and "--frames 3: slow_stride 4" in err
    for wrong in (-1, 1.5, "two"):
        (tmp_path / "recipe.json").write_text(json.dumps(short | {"motion_clips": wrong}))
        code, _, err = run(capsys, *flags)
        assert code == 2 and "recipe.json: not a recipe" in err and "\n" not in err.strip()
    save_policy(tiny_policy(), tmp_path / "plain")
    Recipe(motion_clips=2).save(tmp_path / "plain")
    code, _, err = run(capsys, "--model", tmp_path / "plain", *flags[2:])
    assert code == 2 and "--motion-clips: --model" in err and "has no motion token" in err


def test_motion_recipes_are_those_of_the_converter():
    for name, fields in RECIPES.items():
        assert SlowFastConfig(**fields) == MOTION_RECIPES[name]
        evaluate.parse_arguments(["--video", "x", "--motion-recipe", name])


# ---- folders, suites, and evaluations that were stopped


@pytest.fixture(scope="module")
def loaded():
    return load_scorer(TINY_MODEL, device="cpu")


@pytest.fixture
def quick(monkeypatch, loaded):
    """The tiny model, loaded once for all tests that ask for it with the flags of scoring alone."""

    def load(args, recipe, device):
        how = {"score": args.score, "samples": args.samples or 0, "seed": args.seed or 0, "batch": args.batch}
        return replace(loaded, **how)

    monkeypatch.setattr(evaluate, "load", load)


def write_suite(folder, clips):
    """Two data sets: five clips, one of them broken, and two; the names of a suite file in `folder`."""
    label_lines = (clips / "l.jsonl").read_text().splitlines(keepends=True)
    (folder / "two.jsonl").write_text("".join(label_lines[:2]))
    five = {"name": "five | all", "labels": os.path.relpath(clips / "l.jsonl", folder), "videos": str(clips)}
    two = {"name": "two", "labels": "two.jsonl", "videos": os.path.relpath(clips, folder), "split": "test"}
    (folder / "suite.json").write_text(json.dumps({"datasets": [five, two]}))
    return folder / "suite.json"


def files_of(output):
    """The bytes of every file but those with times in them."""
    files = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "metrics.json"}


def without_times(metrics):
    return {name: {key: x for key, x in row.items() if key != "seconds"} for name, row in metrics["datasets"].items()}


def read_rows(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def undisturbed(clips, tmp_path, capsys, quick):
    """A suite and the folder of its evaluation by one process."""
    suite = write_suite(tmp_path, clips)
    assert run(capsys, "--suite", suite, "--output", tmp_path / "whole")[0] == 0
    return suite, tmp_path / "whole"


def test_a_suite_gives_a_file_for_each_data_set_and_one_for_all(undisturbed, clips, tmp_path, capsys):
    suite, output = undisturbed
    names = {f"{name}/{file}" for name in ("five | all", "two") for file in ("predictions.csv", "settings.json")}
    assert set(files_of(output)) == names | {"results.md"}
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["datasets"]) == ["five | all", "two"] and metrics["scoring"]["score"] == "greedy"
    assert {"model", "recipe", "command", "versions", "means"} <= metrics.keys()
    two = metrics["datasets"]["two"]
    assert (two["scored"], two["listed"], two["srcc"]) == (2, 2, None)
    srcc = metrics["datasets"]["five | all"]["srcc"]
    assert metrics["means"] == {}  # neither is a benchmark
    table = (output / "results.md").read_text()
    assert "1 (bad) to 5 (excellent), higher is better" in table
    assert f"| five &#124; all | 4/5 | {srcc:.3f} [" in table
    code, out, err = run(capsys, "--suite", suite, "--output", tmp_path / "again", "--strict")
    assert code == 1 and f" {srcc:.3f} [" in out and "higher is better" in out and err == ""
    assert files_of(tmp_path / "again") == files_of(output)
    flags = ["--labels", clips / "l.jsonl", "--videos", clips, "--labels", tmp_path / "two.jsonl", "--videos", clips]
    code, _, err = run(capsys, *flags, "--output", tmp_path / "o")  # both say that they are data set d
    assert code == 2 and "two.jsonl: the name 'd' comes twice" in err


def test_benchmarks_stand_beside_what_was_published(clips, tmp_path, capsys, quick):
    suite = write_suite(tmp_path, clips)
    suite.write_text(suite.read_text().replace('"two"', '"LIVE-VQC"'))
    code, out, _ = run(capsys, "--suite", suite, "--output", tmp_path / "out")
    published = BENCHMARKS["LIVE-VQC"].published["VQAThinker"]
    assert code == 0 and "VQAThinker" in out and f"{published['srcc']:.3f}/{published['plcc']:.3f}" in out
    means = json.loads((tmp_path / "out" / "metrics.json").read_text())["means"]
    assert (
        list(means) == ["ood"] and means["ood"]["scored"] == 2 and means["ood"]["published"]["VQAThinker"] == published
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"datasets": []}', "datasets must be a list"),
        ('{"datasets": [], "seed": 1}', "unknown key 'seed'"),
        ('{"datasets": [{"name": "a", "labels": "x"}]}', "datasets[0]: no videos"),
        ('{"datasets": [{"name": "a", "labels": "x", "videos": "y", "mos": 1}]}', "datasets[0]: unknown key 'mos'"),
        ('{"datasets": [{"name": 3, "labels": "x", "videos": "y"}]}', "name must be a text"),
        ('{"datasets": [{"name": "a", "labels": "nowhere.jsonl", "videos": "y"}]}', "nowhere.jsonl cannot be read"),
        ('{"datasets": [{"name": "a", "labels": "two.jsonl", "videos": "nowhere"}]}', "nowhere is not a folder"),
        ('{"datasets": [{"name": "../a", "labels": "two.jsonl", "videos": "."}]}', "can be no folder's"),
        ('{"datasets": [{"name": "..", "labels": "two.jsonl", "videos": "."}]}', "can be no folder's"),
        ('{"datasets": [{"name": "a", "labels": "two.jsonl", "videos": ".", "split": "x"}]}', "no clip with split 'x'"),
    ],
)
def test_a_wrong_suite_is_refused_before_a_model_is_loaded(clips, tmp_path, capsys, monkeypatch, text, named):
    monkeypatch.setattr(evaluate, "load", None)
    suite = write_suite(tmp_path, clips)
    suite.write_text(text)
    code, _, err = run(capsys, "--suite", suite, "--output", tmp_path / "out")
    assert code == 2 and named in err and "\n" not in err.strip() and not (tmp_path / "out").exists()


def test_videos_that_are_all_missing_are_counted(clips, tmp_path, capsys, quick):
    (tmp_path / "empty").mkdir()
    flags = ["--labels", clips / "l.jsonl", "--videos", tmp_path / "empty", "--output", tmp_path / "out"]
    code, out, err = run(capsys, *flags)
    assert code == 0 and "d: 5 of 5 videos are missing, test/00000.mp4 first" in err and " 0/5 " in out
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["datasets"]["d"]
    assert figures["coverage"] == 0 and figures["failures"] == {"unreadable: missing": 5} and figures["srcc"] is None
    # they are tried again once they are there
    flags[3] = clips
    code, _, err = run(capsys, *flags)
    assert code == 2 and f"videos was {tmp_path / 'empty'}, is" in err
    shutil.copytree(clips, tmp_path / "empty", dirs_exist_ok=True)
    assert run(capsys, *flags[:3], tmp_path / "empty", *flags[4:])[0] == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["datasets"]["d"]["scored"] == 4


class Fellows:
    """`grpo.distributed` for processes that are threads."""

    def __init__(self, monkeypatch, world_size):
        own, barrier = threading.local(), threading.Barrier(world_size, timeout=60)
        self.own, self.world_size = own, world_size
        rows = []

        def gather_rows(mine, device):
            rows.extend(mine)
            barrier.wait()
            return rows

        def setup(device, timeout_s):
            barrier.wait()  # as processes that join each other do
            return torch.device("cpu")

        for name, value in {
            "gather_rows": gather_rows,
            "rank": lambda: own.rank,
            "world_size": lambda: world_size,
            "barrier": barrier.wait,
            "setup": setup,
            "from_main": lambda call, device: call(),
        }.items():
            monkeypatch.setattr(distributed, name, value)

    def each(self, work):
        """What `work` returns to each."""

        def ranked(rank):
            self.own.rank = rank
            return work()

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(ranked, range(self.world_size)))

    def run(self, *arguments):
        """The exit status of each."""
        return self.each(lambda: evaluate.main(evaluate.parse_arguments([str(a) for a in arguments])))


@pytest.mark.parametrize("processes", [2, 3])
def test_every_video_is_scored_once_by_any_number_of_processes(undisturbed, tmp_path, monkeypatch, loaded, processes):
    suite, whole = undisturbed
    scored, scores = [], Scorer.scores

    def counted(self, paths, root):
        for score in scores(self, paths, root):
            scored.append(score.path)
            yield score

    monkeypatch.setattr(Scorer, "scores", counted)
    fellows = Fellows(monkeypatch, processes)
    assert fellows.run("--suite", suite, "--output", tmp_path / "out") == [0] * processes
    assert files_of(tmp_path / "out") == files_of(whole)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert without_times(found) == without_times(json.loads((whole / "metrics.json").read_text()))
    assert len(scored) == 5 + 2 and Counter(scored)["test/00000.mp4"] == 2  # once in each data set


@pytest.mark.parametrize("processes", [1, 3, 7])
def test_every_process_gets_all_scores_in_order(clips, monkeypatch, loaded, processes):
    paths = [clip.path for clip in read_labels(clips / "l.jsonl")]
    alone = list(loaded.scores(paths, clips))
    assert [score.path for score in alone] == paths
    every = Fellows(monkeypatch, processes).each(lambda: evaluate.score_over_ranks(loaded, paths, clips))
    assert every == [alone] * processes


STOPPED = """
import itertools, os, runpy, sys
from contextlib import contextmanager
from data import journal

number, sys.argv, appending, rows = int(sys.argv[1]), sys.argv[2:], journal.appending, itertools.count(1)

@contextmanager
def stopped(folder, rank):
    with appending(folder, rank) as write:
        def write_and_stop(row):
            write(row)
            if next(rows) == 3:
                os.kill(os.getpid(), number)
        yield write_and_stop

journal.appending = stopped
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_what_was_stopped_goes_on_by_any_number_of_processes(undisturbed, clips, tmp_path, capsys, monkeypatch, number):
    """Stopped behind the third row, with a torn line; gone on with by three (threads), then once more by one."""
    suite, whole = undisturbed
    output = tmp_path / "out"
    command = [str(ROOT / "evaluate.py"), "--suite", str(suite), "--output", str(output), "--batch", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", STOPPED, str(int(number)), *command]
    done = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert done.returncode == (143 if number == signal.SIGTERM else -9), done.stderr
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM; the same command goes on from here" in done.stderr
        assert "Traceback" not in done.stderr
    partial = output / "five | all" / "partial.rank0.jsonl"
    lines = partial.read_bytes().splitlines()
    assert len(lines) == 3 and not (output / "metrics.json").exists()
    with open(partial, "ab") as file:
        file.write(lines[0][:20])
    scored, scores = [], Scorer.scores
    monkeypatch.setattr(
        Scorer, "scores", lambda self, paths, root: (scored.append(s.path) or s for s in scores(self, paths, root))
    )
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    wrong = ["--suite", suite, "--output", output]
    for flags, named in [
        (["--samples", "2"], "score was greedy, is mean of samples"),
        (["--frames", "5"], "recipe.frames was 6, is 5"),
        (["--precision", "bfloat16"], "precision was float32, is bfloat16"),
    ]:
        code, _, err = run(capsys, *wrong, *flags)
        assert code == 2 and "holds another evaluation: " in err and named in err and "\n" not in err.strip()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    with monkeypatch.context() as patched:
        assert Fellows(patched, 3).run("--suite", suite, "--output", output) == [0] * 3
    assert files_of(output) == files_of(whole)
    done_before = [json.loads(line)["path"] for line in lines if json.loads(line)["status"] == "ok"]
    assert len(scored) == 7 - len(done_before)
    scored.clear()
    assert run(capsys, "--suite", suite, "--output", output)[0] == 0
    assert scored == ["broken, really.mp4"] and files_of(output) == files_of(whole)
    (tmp_path / "two.jsonl").write_text((tmp_path / "two.jsonl").read_text().replace("20.0", "21.0"))
    code, _, err = run(capsys, "--suite", suite, "--output", output)
    assert code == 2 and "two holds another evaluation: labels was" in err


def test_real_processes_share_the_work(undisturbed, tmp_path):
    suite, whole = undisturbed
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "evaluate.py", "--suite", str(suite), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(whole) and done.stdout.count("\ntwo ") == 1


def test_a_model_that_has_changed_is_another_evaluation(clips, tmp_path, capsys, monkeypatch):
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--labels", clips / "l.jsonl", "--videos", clips]
    flags += ["--output", tmp_path / "out"]
    assert run(capsys, *flags)[0] == 0
    monkeypatch.setattr(evaluate, "load", None)
    for change in (lambda folder: os.utime(folder / "model.safetensors", ns=(1, 1)), checkpoint.write_manifest):
        change(tmp_path / "model")
        code, _, err = run(capsys, *flags)
        assert code == 2 and "d holds another evaluation: model was" in err


def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(clips, tmp_path, capsys):
    model = tmp_path / "best"
    shutil.copytree(TINY_MODEL, model)
    checkpoint.write_manifest(model)
    flags = ["--model", model, "--video", clips / "test" / "00001.mp4"]
    assert run(capsys, *flags)[0] == 0
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    code, _, err = run(capsys, *flags)
    assert code == 2 and f"--model {model}: damaged: model.safetensors: sha256 differs" in err


def test_a_folder_is_scored_to_a_csv(clips, tmp_path, capsys, quick):
    folder, out = tmp_path / "clips", tmp_path / "new" / "scores.csv"
    shutil.copytree(clips / "test", folder / "sub")
    names = ["=1+1.mp4", 'a, "b".mp4', "line\nbreak.mp4", "🎬.MP4"]
    for name in names:
        shutil.copy(clips / "test" / "00001.mp4", folder / name)
    (folder / "notes.txt").write_text("no video")
    code, told, err = run(capsys, "--folder", folder, "--csv", out)
    assert code == 0 and "8 of 8 videos have a score, 1 (bad) to 5 (excellent), higher is better" in told and err == ""
    rows = read_rows(out)
    assert [row["path"] for row in rows] == sorted([*names, *(f"sub/0000{k}.mp4" for k in range(4))])
    same = {row["score"] for row in rows if row["path"] in {*names, "sub/00001.mp4"}}
    assert len(same) == 1 and 1 <= float(same.pop()) <= 5
    assert list(out.parent.iterdir()) == [out]
    (folder / "bad.mp4").write_bytes(b"")
    assert run(capsys, "--folder", folder, "--csv", out)[0] == 0
    assert run(capsys, "--folder", folder, "--csv", out, "--strict")[0] == 1
    assert {row["path"]: row["status"] for row in read_rows(out)}["bad.mp4"] == "unreadable"
    code, _, err = run(capsys, "--folder", tmp_path / "new", "--csv", out)
    assert code == 2 and "no video file there" in err


def test_a_folder_of_other_things_is_left_alone(clips, tmp_path, capsys, quick):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "predictions.csv").write_text("mine")
    code, _, err = run(capsys, "--labels", clips / "l.jsonl", "--videos", clips, "--output", tmp_path)
    assert code == 2 and f"{tmp_path / 'd'} holds files and no settings.json" in err
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "predictions.csv"]


def test_samples_are_in_the_table(clips, tmp_path, capsys, quick):
    flags = ["--labels", clips / "l.jsonl", "--videos", clips, "--output", tmp_path / "out", "--samples", "4"]
    assert run(capsys, *flags)[0] == 0
    rows = read_rows(tmp_path / "out" / "d" / "predictions.csv")
    for row in rows:
        answers = [answer for answer in json.loads(row["answers"] or "[]") if answer is not None]
        assert bool(answers) == (row["status"] == "ok")
        if answers:
            assert float(row["score"]) == pytest.approx(statistics.fmean(answers))
            assert float(row["spread"]) == pytest.approx(statistics.stdev(answers))
    before = files_of(tmp_path / "out")
    assert run(capsys, *flags, "--seed", "0")[0] == 0 and files_of(tmp_path / "out") == before
    code, _, err = run(capsys, *flags, "--seed", "1")
    assert code == 2 and "seed was 0, is 1" in err


def test_several_videos_are_told_one_by_one(clips, capsys, quick):
    good, bad = clips / "test" / "00001.mp4", clips / "broken, really.mp4"
    several = ["--video", good, "--video", bad, "--video", good]
    code, out, _ = run(capsys, *several, "--json", "--score", "expected")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["path"] for row in rows] == [str(good), str(bad), str(good)]
    assert rows[0] == rows[2] and rows[0]["mos_range"] == [1, 5] and rows[0]["higher_is_better"] is True
    assert rows[1]["score"] is None and 0 < rows[0]["mass"] <= 1 and rows[0]["spread"] > 0
    code, out, _ = run(capsys, *several, "--strict")
    assert code == 1 and out.count(f"{good}: score: ") == 2 and f"{bad}: no score (unreadable)" in out
    code, out, _ = run(capsys, "--video", good, "--samples", "3")
    assert "the mean of 3 of 3 answers, on 1 (bad) to 5 (excellent), higher is better" in out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--folder", "x"], "--folder needs --csv"),
        (["--suite", "x"], "--suite needs --output"),
        (["--suite", "x", "--folder", "y"], "--folder goes without --suite"),
        (["--labels", "x", "--videos", "y"], "--labels needs --output"),
        (["--labels", "x", "--videos", "y", "--labels", "z", "--output", "o"], "--labels came 2 times and --videos 1"),
        (["--video", "x", "--csv", "y"], "--csv goes with --folder, not with --video"),
        (["--folder", "x", "--csv", "y", "--json"], "--json goes with --video"),
        (["--video", "x", "--samples", "0"], "--samples 0: must be at least 1"),
        (["--video", "x", "--samples", "2", "--score", "expected"], "--samples 2: goes without --score expected"),
        (["--video", "x", "--seed", "1"], "--seed 1: goes with --samples"),
        (["--video", "x", "--temperature", "0.5"], "--temperature 0.5: goes with --samples or --score expected"),
        (["--video", "x", "--samples", "2", "--temperature", "0"], "--temperature 0.0: must be a number above 0"),
        (["--video", "x", "--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_named(capsys, flags, named):
    code, _, err = run(capsys, *flags)
    assert code == 2 and named in err and "\n" not in err.strip()


def test_an_output_that_can_be_no_folder_is_named(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    (tmp_path / "file").write_text("")
    for flags in (
        ["--labels", clips / "l.jsonl", "--videos", clips, "--output", tmp_path / "file"],
        ["--folder", clips, "--csv", tmp_path / "file" / "scores.csv"],
    ):
        code, _, err = run(capsys, *flags)
        assert code == 2 and f"{flags[-2]}: no folder {tmp_path / 'file'} can be made" in err


ASSETS = os.environ.get("VQA_TEST_ASSETS")


@pytest.mark.skipif(not ASSETS, reason="VQA_TEST_ASSETS names no folder with the field's label files and videos")
def test_the_fields_lists_are_a_suite_and_real_videos_have_scores(tmp_path, capsys, quick):
    """All ten lists, their videos missing; and the real videos that have a MOS."""
    (tmp_path / "videos").mkdir()
    datasets = []
    for name, file in LISTS.items():
        out = tmp_path / f"{name}.jsonl"
        source = str(Path(ASSETS, "labels", "annotations_json", file))
        assert label_tool.main(["convert", source, "--out", str(out), "--dataset", name]) == 0
        datasets.append({"name": name, "labels": out.name, "videos": "videos"})
    (tmp_path / "suite.json").write_text(json.dumps({"datasets": datasets}))
    assert run(capsys, "--suite", tmp_path / "suite.json", "--output", tmp_path / "out")[0] == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["datasets"]) == list(LISTS)
    assert all(found["coverage"] == 0 and found["listed"] > 300 for found in metrics["datasets"].values())

    with open(Path(ASSETS, "videos", "pairs.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    clips = [
        Clip(row["path"], float(row["mos"]), (float(row["mos_min"]), float(row["mos_max"])), row["dataset"], "test")
        for row in rows
    ]
    write_labels(clips, tmp_path / "pairs.jsonl")
    flags = ["--labels", tmp_path / "pairs.jsonl", "--videos", Path(ASSETS, "videos"), "--output", tmp_path / "pairs"]
    assert run(capsys, *flags)[0] == 0
    (found,) = json.loads((tmp_path / "pairs" / "metrics.json").read_text())["datasets"].values()
    assert found["coverage"] == 1
