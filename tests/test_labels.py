import json
import subprocess
import sys

import pytest

from data.labels import Clip, missing_videos, read_labels, write_labels

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
