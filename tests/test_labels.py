import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.label_formats import FORMATS
from data.label_tool import histogram, main
from data.labels import Clip, missing_videos, read_labels, write_labels
from data.synthetic import write_mp4

GOOD = {"path": "a.mp4", "mos": 3, "mos_range": [1, 5], "dataset": "D", "split": "train"}


def write(tmp_path, *lines):
    file = tmp_path / "labels.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def test_reads_every_field_and_keeps_the_rest(tmp_path):
    file = write(tmp_path, {**GOOD, "severity": 0.5}, b"", {**GOOD, "path": "dir/b c é 🎬.mp4", "mos": 4.5})
    first, second = read_labels(file)
    assert first == Clip("a.mp4", 3.0, (1.0, 5.0), "D", "train", {"severity": 0.5})
    assert (second.path, second.mos, second.extra) == ("dir/b c é 🎬.mp4", 4.5, {})
    assert isinstance(first.mos, float) and len({first, second}) == 2


@pytest.mark.parametrize(
    ("mos", "mos_range", "target"),
    [(0, (0, 100), 1), (100, (0, 100), 5), (25, (0, 100), 2), (3.46, (1, 5), 3.46), (0, (-4, 4), 3)],
)
def test_target_is_linear_from_range_to_1_5(mos, mos_range, target):
    assert Clip("a", mos, mos_range, "D", "s").target == pytest.approx(target, abs=1e-12)


@pytest.mark.parametrize(
    ("mos", "high", "target"), [(52.23684, 100, 2.611842), (0, 100, 0), (100, 100, 5), (2.5, 5, 2.5)]
)
def test_released_target_is_five_times_the_share_of_the_range(mos, high, target):
    assert Clip("a", mos, (0, high), "D", "s", mapping="released").target == pytest.approx(target, abs=1e-12)


def test_mapping_is_checked_and_not_written(tmp_path):
    file = write(tmp_path, {**GOOD, "mos_range": [0, 10]}, {**GOOD, "path": "b.mp4", "split": "test"})
    with pytest.raises(
        ValueError, match=r":2: --mos-mapping released needs a mos_range that starts at 0, got \[1.0, 5"
    ):
        read_labels(file, split="train", mapping="released")
    with pytest.raises(ValueError, match=r"--mos-mapping square: choose one of linear, released"):
        read_labels(file, mapping="square")
    file = write(tmp_path, {**GOOD, "mos_range": [0, 10]})
    (clip,) = read_labels(file, mapping="released")
    assert (clip.mapping, clip.target) == ("released", 1.5)
    write_labels([clip], file)
    assert read_labels(file)[0].mapping == "linear" and "released" not in file.read_text()


def test_split_is_chosen_in_file_order(tmp_path):
    file = write(tmp_path, *({**GOOD, "path": f"{i}.mp4", "split": "val" if i % 2 else "train"} for i in range(6)))
    assert [clip.path for clip in read_labels(file, "val")] == ["1.mp4", "3.mp4", "5.mp4"]
    assert len(read_labels(file)) == 6
    with pytest.raises(
        ValueError, match=r"--labels .*jsonl has no clip with split 'test' \(splits found: train, val\)"
    ):
        read_labels(file, "test")


def test_write_then_read_gives_the_same_clips(tmp_path):
    clips = [
        Clip("a.mp4", 50.25, (0.0, 100.0), "LSVQ", "train"),
        Clip("sub/日本 %d:x.mp4", 1.0, (1.0, 5.0), "D", "val", {"distortion": ["blur"], "n": None}),
    ]
    write_labels(clips, tmp_path / "out.jsonl")
    assert read_labels(tmp_path / "out.jsonl") == clips


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "byte order mark"),
        (json.dumps(GOOD).encode("utf-16"), "byte order mark"),
        (b'{"path": "\xff"}', "utf-8"),
        (b"[" * 100_000, "recursion"),
        ({"path": "b.mp4", "mos": 3}, "no mos_range, dataset, split"),
        ({**GOOD, "mos": "3"}, "mos must be a number, got '3'"),
        ({**GOOD, "mos": True}, "mos must be a number"),
        ({**GOOD, "mos": None}, "mos must be a number"),
        ({**GOOD, "mos": float("nan")}, "NaN is not a JSON number"),
        (json.dumps(GOOD).replace('"mos": 3', '"mos": 1e400').encode(), "mos must be a number, got inf"),
        ({**GOOD, "mos": 10**400}, "mos must be a number"),
        ({**GOOD, "mos": 5.01}, r"mos 5.01 is outside mos_range \[1, 5\]"),
        ({**GOOD, "mos": 0.99}, "outside"),
        ({**GOOD, "mos_range": [5, 1]}, "low < high"),
        ({**GOOD, "mos_range": [3, 3]}, "low < high"),
        ({**GOOD, "mos_range": [1, "5"]}, "two numbers"),
        ({**GOOD, "mos_range": 5}, "two numbers"),
        ({**GOOD, "mos_range": [1, 2, 3]}, "two numbers"),
        ({**GOOD, "path": "/etc/passwd"}, "under the video folder"),
        ({**GOOD, "path": "x/../../b.mp4"}, "under the video folder"),
        ({**GOOD, "path": ""}, "path must be a file name"),
        ({**GOOD, "path": 7}, "path must be a file name"),
        ({**GOOD, "path": "b\0.mp4"}, "path must be a file name"),
        ({**GOOD, "path": "\ud800.mp4"}, "surrogates"),
        ({**GOOD, "dataset": 7}, "dataset must be a text"),
        ({**GOOD, "split": ""}, "split must be a text"),
        ({**GOOD, "path": "./first.mp4"}, "is already on line 1"),
    ],
)
def test_bad_line_is_named_with_file_and_line(tmp_path, line, says):
    file = write(tmp_path, {**GOOD, "path": "first.mp4"}, line)
    with pytest.raises(ValueError, match=says) as caught:
        read_labels(file, split="train")
    assert str(caught.value).startswith(f"{file}:2: ")


def test_a_bad_line_of_another_split_counts_too(tmp_path):
    with pytest.raises(ValueError, match=":2: mos"):
        read_labels(write(tmp_path, GOOD, {**GOOD, "path": "b.mp4", "split": "test", "mos": "x"}), split="train")


def test_missing_file_and_empty_file(tmp_path):
    with pytest.raises(ValueError, match=r"--labels .*nothing\.jsonl cannot be read: No such file"):
        read_labels(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"--labels .* has no clip$"):
        read_labels(write(tmp_path, b"\n"))


def test_missing_videos(tmp_path):
    clips = [Clip(path, 3.0, (1.0, 5.0), "D", "train") for path in ("a.mp4", "b.mp4", "c" * 300)]
    with pytest.raises(ValueError, match=r"--videos .* is not a folder"):
        missing_videos(clips, tmp_path / "none")
    with pytest.raises(ValueError, match=r"--videos .* has none of the 3 labelled files \(first: a.mp4\)"):
        missing_videos(clips, tmp_path)
    (tmp_path / "b.mp4").touch()
    assert missing_videos(clips, tmp_path) == [clips[0], clips[2]]


def test_labels_are_checked_without_torch():
    code = "import sys, data.labels; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_known_format_is_named_with_the_command_that_converts_it(tmp_path):
    file = tmp_path / "my labels.txt"
    file.write_text("a.mp4, -1, -1, 3.5\n")
    with pytest.raises(ValueError) as caught:
        read_labels(file)
    assert str(caught.value) == (
        f"--labels {file}:1: not this project's JSONL but 'name, x, y, MOS' text; convert it: "
        f"python -m data.labels convert '{file}' --out '{tmp_path}/my labels.jsonl' --dataset NAME --mos-range LO HI"
    )
    released = tmp_path / "train.jsonl"
    released.write_text(json.dumps({"image": ["a"], "conversations": [], "dataset_name": "LSVQ"}))
    with pytest.raises(ValueError, match=r"JSONL with image and conversations.* --out .*/train\.labels\.jsonl "):
        read_labels(released)
    released.write_text("a b c\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:1: not JSON"):
        read_labels(released)


# ---- python -m data.labels


def convert(tmp_path, text, *flags, name="in.txt", out="out.jsonl"):
    (tmp_path / name).write_text(text)
    return main(["convert", str(tmp_path / name), "--out", str(tmp_path / out), *flags])


def refused(capsys, run):
    """The one line that a wrong command leaves on stderr, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run()
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("python -m data.labels")
    return err


def released_test(*names, score="62.4"):
    return json.dumps({"annotations": [{"image_id": name, "ann_type": "score", "score": score} for name in names]})


def test_help_answers_at_once_and_imports_neither_torch_nor_numpy():
    code = "import sys\nfrom data.label_tool import main\ntry: main(['convert', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10)
    assert shown.returncode == 0 and all(name in shown.stdout for name in FORMATS)


def test_convert_as_a_command_writes_what_read_labels_reads(tmp_path):
    (tmp_path / "in.txt").write_text('"a, 1.mp4", 8, 30, 20\nb.mp4, 8, 25, 100')
    command = [sys.executable, "-m", "data.labels", "convert", str(tmp_path / "in.txt"), "--out"]
    command += [str(tmp_path / "out.jsonl"), "--dataset", "D", "--mos-range", "-10", "100", "--split", "val"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert (
        "2 clips from 2 sources, read as name-seconds-fps-mos" in done.stdout and "-10 to 100, as given" in done.stdout
    )
    assert read_labels(tmp_path / "out.jsonl") == [
        Clip("a, 1.mp4", 20.0, (-10.0, 100.0), "D", "val", {"seconds": 8.0, "fps": 30.0}),
        Clip("b.mp4", 100.0, (-10.0, 100.0), "D", "val", {"seconds": 8.0, "fps": 25.0}),
    ]


def test_convert_takes_scale_and_source_of_a_benchmark_and_says_so(tmp_path, capsys):
    convert(tmp_path, released_test("VP9_07_960x540_1.mp4"), "--dataset", "Waterloo-IVC-4K")
    expected = Clip("VP9_07_960x540_1.mp4", 62.4, (0.0, 100.0), "Waterloo-IVC-4K", "test", {"source": "07"})
    assert read_labels(tmp_path / "out.jsonl") == [expected]
    assert "0 to 100, of Waterloo-IVC-4K in data/benchmarks.json (secondary source)" in capsys.readouterr().out
    convert(tmp_path, released_test("1.mp4"), "--dataset", "KoNViD-1k", out="konvid.jsonl")
    assert read_labels(tmp_path / "konvid.jsonl")[0].target == pytest.approx(62.4 / 20)
    convert(tmp_path, "1.mp4, 8, 30, 3.12", "--dataset", "KoNViD-1k", out="own.jsonl")
    (clip,) = read_labels(tmp_path / "own.jsonl")
    assert (clip.target, clip.split) == (pytest.approx(3.12), "train")


def test_a_project_file_keeps_what_its_lines_state_unless_told_otherwise(tmp_path):
    lines = "\n".join(json.dumps({**GOOD, "path": f"{i}_v.mp4", "split": s}) for i, s in enumerate(("train", "test")))
    convert(tmp_path, lines, "--source-pattern", r"(\d)_")
    expected = [
        Clip("0_v.mp4", 3, (1, 5), "D", "train", {"source": "0"}),
        Clip("1_v.mp4", 3, (1, 5), "D", "test", {"source": "1"}),
    ]
    assert read_labels(tmp_path / "out.jsonl") == expected
    flags = ("--dataset", "E", "--split", "s", "--mos-range", "0", "10", "--source-pattern", r"_(.)")
    convert(tmp_path, (tmp_path / "out.jsonl").read_text(), *flags, out="again.jsonl")
    expected = [Clip(f"{i}_v.mp4", 3, (0, 10), "E", "s", {"source": "v"}) for i in range(2)]
    assert read_labels(tmp_path / "again.jsonl") == expected


def test_a_source_in_the_file_stands_above_the_pattern_of_the_benchmark(tmp_path):
    convert(tmp_path, json.dumps({**GOOD, "source": "mine"}), "--dataset", "VDPVE")
    assert read_labels(tmp_path / "out.jsonl") == [Clip("a.mp4", 3, (1, 5), "VDPVE", "train", {"source": "mine"})]


def test_convert_splits_off_validation_by_source(tmp_path, capsys):
    text = "".join(f"{source}_{version}.mp4, -1, -1, {source}\n" for source in range(20) for version in range(3))
    flags = (
        "--dataset",
        "D",
        "--mos-range",
        "0",
        "20",
        "--source-pattern",
        r"^(\d+)_",
        "--val-fraction",
        "0.2",
        "--seed",
        "3",
    )
    convert(tmp_path, text, *flags)
    clips = read_labels(tmp_path / "out.jsonl")
    sources = {split: {clip.extra["source"] for clip in clips if clip.split == split} for split in ("train", "val")}
    assert len(sources["val"]) == 4 and len(sources["train"]) == 16 and not sources["val"] & sources["train"]
    assert "60 clips from 20 sources" in capsys.readouterr().out


def test_convert_completes_names_and_counts_missing_files(tmp_path, capsys):
    (tmp_path / "a.mkv").touch()
    convert(
        tmp_path, "name,MOS,fps\na,1,30\nb,2,25\n", "--dataset", "D", "--mos-range", "1", "5", "--videos", str(tmp_path)
    )
    assert [(clip.path, clip.extra) for clip in read_labels(tmp_path / "out.jsonl")] == [
        ("a.mkv", {"fps": "30"}),
        ("b", {"fps": "25"}),
    ]
    assert "missing files: 1 of 2" in capsys.readouterr().out


LIST = "a.mp4, -1, -1, 3\nb.mp4, -1, -1, 4\n"
SCALED = ("--dataset", "D", "--mos-range", "1", "5")


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        (LIST, ("--dataset", "D", "--mos-range", "1", "3.5"), "in.txt:2: mos 4.0 is outside the stated range"),
        (LIST + LIST, SCALED, "in.txt:3: path 'a.mp4' is already on line 1 (2 faults in all)"),
        (LIST, ("--dataset", "D"), "--mos-range is needed: D is not one of LSVQ-test, LSVQ-1080p,"),
        (LIST, ("--mos-range", "1", "5"), "--dataset is needed"),
        (LIST, ("--dataset", "D", "--mos-range", "5", "1"), "--mos-range 5 1: must be two finite numbers"),
        (LIST, ("--dataset", "D", "--mos-range", "0", "inf"), "--mos-range 0 inf: must be two finite numbers"),
        (LIST, ("--dataset", "D", "--mos-range", "0", "x"), "--mos-range: invalid float value: 'x'"),
        (LIST, ("--dataset", "", "--mos-range", "1", "5"), "--dataset must not be empty"),
        (LIST, (*SCALED, "--split", ""), "--split must not be empty"),
        (LIST, (*SCALED, "--seed", "1"), "--val-fraction and --seed need each other"),
        (LIST, (*SCALED, "--val-fraction", "0.5"), "--val-fraction and --seed need each other"),
        (LIST, (*SCALED, "--val-fraction", "2", "--seed", "1"), "--val-fraction 2.0: must be above 0 and below 1"),
        (LIST, (*SCALED, "--source-pattern", "("), "--source-pattern (: "),
        (LIST, (*SCALED, "--source-pattern", "(.)(.)"), "must have one group, it has 2"),
        (LIST, (*SCALED, "--source-pattern", "(a)"), "--source-pattern (a): finds no source in 'b.mp4'"),
        (LIST, (*SCALED, "--source-pattern", "(x)?"), "--source-pattern (x)?: finds no source in 'a.mp4'"),
        (LIST, ("--dataset", "VDPVE"), "finds no source in 'a.mp4'"),
        (LIST, (*SCALED, "--label-format", "csv"), "in.txt:1: the header must have one column for the file name"),
        (LIST, (*SCALED, "--label-format", "xml"), "invalid choice: 'xml'"),
        (LIST, (*SCALED, "--videos", "nowhere"), "--videos nowhere is not a folder"),
        (LIST, (*SCALED, "--mos", "3"), "unrecognized arguments: --mos"),
        ("a b 3\n", SCALED, "in.txt: no known label format fits"),
        ('{"annotations": []}', SCALED, "in.txt has no clip"),
        (json.dumps({"image": ["a"], "dataset_name": "LSVQ", "conversations": [{"from": "gpt", "value": 3}]}),
         ("--dataset", "LSVQ-test"), "--mos-range is needed: the released training list is not on the scale"),
    ],
)  # fmt: skip
def test_convert_refuses_in_one_line_and_writes_nothing(tmp_path, capsys, text, flags, says):
    assert says in refused(capsys, lambda: convert(tmp_path, text, *flags))
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_convert_leaves_an_existing_file_alone_and_never_half_of_a_new_one(tmp_path, capsys, monkeypatch):
    (tmp_path / "out.jsonl").write_text("mine")
    assert "out.jsonl exists already" in refused(capsys, lambda: convert(tmp_path, LIST, *SCALED))
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    for out in ("no/folder.jsonl", "in.txt/x.jsonl", "x" * 250):
        message = refused(capsys, lambda out=out: convert(tmp_path, LIST, *SCALED, out=out))
        assert "--out " in message and "cannot be written" in message

    lines = iter(["half a li"])

    def full_disk(*_, **__):
        for line in lines:
            return line
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.labels.json.dumps", full_disk)
    assert "No space left on device" in refused(capsys, lambda: convert(tmp_path, LIST, *SCALED, out="new.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def write_video(file):
    write_mp4(torch.zeros(2, 3, 32, 32), 30, file)


def check(tmp_path, text, *flags):
    (tmp_path / "labels").write_text(text)
    return main(["check", str(tmp_path / "labels"), "--videos", str(tmp_path), *flags])


def test_check_reports_everything_it_can(tmp_path, capsys):
    write_video(tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").mkdir()
    paths = ["good.mp4", "bad.mp4", *(f"gone{i}.mp4" for i in range(12))]
    lines = [json.dumps({**GOOD, "path": path, "mos": 1 + k % 2}) for k, path in enumerate(paths)]
    lines[1:1] = ["{", json.dumps({**GOOD, "path": "./good.mp4"}), json.dumps({**GOOD, "mos": "3"})]
    assert check(tmp_path, "\n".join(lines)) == 1
    out = capsys.readouterr().out.splitlines()
    file = tmp_path / "labels"
    assert out[:7] == [
        "format: project (JSONL with path, mos, mos_range, dataset, split)",
        "clips: 14",
        "  D, train: 14",
        "faulty lines: 3",
        f"  {file}:2: not JSON: Expecting property name enclosed in double quotes (column 2)",
        f"  {file}:3: path './good.mp4' is already on line 1",
        f"  {file}:4: mos must be a number, got '3'",
    ]
    assert out[7:10] == ["  of these, paths that come twice: 1", "missing files: 12", "  gone0.mp4"]
    assert out[19:22] == ["  ... and 2 more", "unreadable files: 1, refused 1", out[21]]
    assert out[21].startswith(f"  {tmp_path}/bad.mp4: refused (")
    assert out[22] == "MOS: 1 to 2 found, 1 to 5 stated"
    assert [line.split()[:4] for line in out[23:26]] == [
        ["1.000", "to", "1.400", "7"],
        ["1.400", "to", "1.800", "0"],
        ["1.800", "to", "2.200", "7"],
    ]
    assert len(out) == 33


def test_exit_status_of_check(tmp_path, capsys):
    assert check(tmp_path, LIST) == 0
    assert "missing files: 2" in capsys.readouterr().out
    assert check(tmp_path, LIST, "--strict") == 1
    assert check(tmp_path, LIST.replace("4", "four")) == 1
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").touch()
    assert check(tmp_path, LIST, "--strict") == 1
    write_video(tmp_path / "b.mp4")
    assert check(tmp_path, LIST, "--strict") == 0
    (tmp_path / "labels").unlink()
    assert "labels cannot be read" in refused(capsys, lambda: main(["check", f"{tmp_path}/labels", "--videos", "."]))
    assert "is not a folder" in refused(capsys, lambda: main(["check", "labels", "--videos", f"{tmp_path}/none"]))
    assert "--videos" in refused(capsys, lambda: main(["check", "labels"]))


def test_check_lists_twenty_faults_and_counts_all(tmp_path, capsys):
    assert check(tmp_path, LIST + "c.mp4, -1, -1, x\n" * 25) == 1
    out = capsys.readouterr().out
    assert "faulty lines: 25" in out and out.count("must be a finite number") == 20 and "... and 5 more" in out


def test_histogram_by_hand():
    assert histogram([0, 0.99, 1, 5, 9.5, 10], 0, 10) == [2, 1, 0, 0, 0, 1, 0, 0, 0, 2]


ASSETS = os.environ.get("VQA_TEST_ASSETS")


@pytest.mark.skipif(not ASSETS, reason="VQA_TEST_ASSETS names no folder with the field's label files")
def test_the_real_training_list_converts_and_splits(tmp_path, capsys):
    """28,056 clips. 220 names come twice, in two folders; the versions of each stay on one side."""
    labels, out = Path(ASSETS, "labels", "txt", "LSVQ_train_labels.txt"), tmp_path / "out.jsonl"
    flags = ["--dataset", "LSVQ", "--mos-range", "0", "100", "--val-fraction", "0.05", "--seed", "0"]
    assert main(["convert", str(labels), "--out", str(out), *flags]) == 0
    clips = read_labels(out)
    val, train = ([clip for clip in clips if clip.split == split] for split in ("val", "train"))
    assert len(clips) == 28056 and len(val) in (1402, 1403, 1404)
    names = [{Path(clip.path).name for clip in side} for side in (val, train)]
    assert sum(map(len, names)) == 28056 - 220 and not names[0] & names[1]
    means = [sum(clip.mos for clip in side) / len(side) for side in (val, train)]
    assert abs(means[0] - means[1]) < 0.1  # drawn at random: standard deviation 0.4
