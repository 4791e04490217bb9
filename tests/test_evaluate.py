"""evaluate.py: correlations against slow versions, files that cannot be scored, the command line."""

import csv
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest

import evaluate
from data import synthetic
from data.labels import Clip, write_labels
from data.recipe import Recipe
from models import scorer
from models.checkpoints import MOTION_RECIPES
from models.loading import PRECISIONS, load_policy, save_policy
from models.slowfast import RECIPES, SlowFastConfig
from tests.helpers import motion_policy, tiny_policy

ROOT = Path(__file__).resolve().parents[1]


def slow_ranks(values):
    """Average ranks by counting."""
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


def slow_pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def slow_kendall(x, y):
    """Tau-b by looking at every pair."""
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    sign = lambda v: (v > 0) - (v < 0)  # noqa: E731
    a, b = [sign(x[i] - x[j]) for i, j in pairs], [sign(y[i] - y[j]) for i, j in pairs]
    return sum(p * q for p, q in zip(a, b)) / math.sqrt(sum(map(abs, a)) * sum(map(abs, b)))


@pytest.mark.parametrize("slope", [1, -1])
def test_correlations_equal_slow_versions_with_ties_and_unscored_videos(slope):
    rng = random.Random(0)
    mos = [rng.uniform(1, 5) for _ in range(40)]
    scores = [round(min(5, max(1, 3 + slope * (m - 3) + rng.gauss(0, 0.7))), 1) for m in mos]
    given = [None if k % 7 == 0 else s for k, s in enumerate(scores)]
    x = [s for s in given if s is not None]
    y = [m for s, m in zip(given, mos) if s is not None]
    found = evaluate.correlations(given, mos)
    assert found["srcc"] == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)))
    assert found["plcc"] == pytest.approx(slow_pearson(x, y))
    assert found["krcc"] == pytest.approx(slow_kendall(x, y))
    assert found["rmse"] == pytest.approx(math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y)) / len(x)))
    assert (found["scored"], found["listed"]) == (len(x), 40) and found["coverage"] == len(x) / 40
    assert found["srcc"] * slope > 0 and found["undefined"] is None


@pytest.mark.parametrize(
    ("scores", "reason"),
    [([], "fewer"), ([None] * 5, "fewer"), ([1.0, 2.0, None], "fewer"), ([3.0, 3.0, 3.0, 3.0], "equal")],
)
def test_undefined_correlations_are_none_with_a_reason(scores, reason):
    found = evaluate.correlations(scores, [1.0, 2.0, 3.0, 4.0, 5.0][: len(scores)])
    assert found["srcc"] is found["plcc"] is found["krcc"] is None and reason in found["undefined"]
    json.dumps(found, allow_nan=False)


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
    assert list(rows[0]) == columns
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
    assert figures["srcc"] == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)))
    assert metrics["means"]["srcc"] == {"mean": figures["srcc"], "datasets": 1}


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
    assert code == 1 and "no score (unreadable" in out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--video"),
        (["--labels", "x"], "--videos"),
        (["--video", "x", "--labels", "y"], "--labels"),
        (["--video", "x", "--model", "./nowhere"], "--model"),
        (["--video", "x", "--frames", "0"], "--frames"),
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
    assert done.returncode == 0 and "--strict" in done.stdout


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
