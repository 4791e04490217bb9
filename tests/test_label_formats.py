"""Readers of the field's label files: every format, every fault at its line, the real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.label_formats import FORMATS, open_labels, read_rows


def read(tmp_path, content, label_format=None, name="labels", **options):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    chosen, content = open_labels(file, label_format)
    return chosen, *read_rows(chosen, content, **options)


def train_line(path="yfcc-batch6/4134.mp4", score=2.611842, **changes):
    turns = [{"from": "human", "value": "How good?"}, {"from": "gpt", "value": score}]
    return json.dumps({"id": 0, "dataset_name": "LSVQ", "image": [path], "conversations": turns, **changes})


def annotations(*pairs):
    return json.dumps({"annotations": [{"image_id": p, "ann_type": "score", "score": s} for p, s in pairs]}, indent=1)


PROJECT = '{"path": "a.mp4", "mos": 3, "mos_range": [1, 5], "dataset": "D", "split": "test", "crf": 7}\n'
ODD = "日 本, 🎬:%d.mp4"

GOOD = {
    "project": (PROJECT, [("1", "a.mp4", 3.0, {"crf": 7})]),
    "released-train": (
        train_line() + "\n\n" + train_line(ODD, 5),
        [("1", "yfcc-batch6/4134.mp4", 2.611842, {"dataset_name": "LSVQ"}), ("3", ODD, 5.0, {"dataset_name": "LSVQ"})],
    ),
    "released-test": (
        annotations(("8129160337.mp4", "62.400"), (ODD, "7")),  # an item is five lines, the first on line 3
        [("3: annotations[0]", "8129160337.mp4", 62.4, {}), ("8: annotations[1]", ODD, 7.0, {})],
    ),
    "score-list": (
        '[{"img_path": "a.mp4", "gt_score": 4.64},\n\n {"image": "b.mp4", "gt_score": 1, "fold": 2}]',
        [("1: list[0]", "a.mp4", 4.64, {}), ("3: list[1]", "b.mp4", 1.0, {"fold": 2})],
    ),
    "name-x-y-mos": (
        f'yfcc-batch1/722.mp4, -1, -1, 78.77\n\n"{ODD}", -1, -1, .5e2',
        [("1", "yfcc-batch1/722.mp4", 78.77, {}), ("3", ODD, 50.0, {})],
    ),
    "name-seconds-fps-mos": (
        "Video/A 1.mp4, 10.04, 29.97, 80.232\nb.mp4,8,30,+3 ",
        [
            ("1", "Video/A 1.mp4", 80.232, {"seconds": 10.04, "fps": 29.97}),
            ("2", "b.mp4", 3.0, {"seconds": 8.0, "fps": 30.0}),
        ],
    ),
    "csv": (
        f'name,p1,height,mos\nyfcc-batch1/722,"[263, 1031]",1080,78.5\n"{ODD}",,720, 3 \n',
        [
            ("2", "yfcc-batch1/722", 78.5, {"p1": "[263, 1031]", "height": "1080"}),
            ("3", ODD, 3.0, {"p1": "", "height": "720"}),
        ],
    ),
}


def test_every_format_is_read_below():
    assert GOOD.keys() == FORMATS.keys()


@pytest.mark.parametrize("label_format", FORMATS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_is_read_and_its_format_told_by_content(tmp_path, label_format, line_end):
    text, expected = GOOD[label_format]
    chosen, rows, faults = read(tmp_path, text.replace("\n", line_end))
    assert (chosen, faults) == (label_format, [])
    assert [(row.place, row.path, row.mos, row.extra) for row in rows] == expected
    if label_format == "project":
        assert (rows[0].mos_range, rows[0].dataset, rows[0].split) == ((1.0, 5.0), "D", "test")
    else:
        assert {(row.mos_range, row.dataset, row.split) for row in rows} == {(None, None, None)}


@pytest.mark.parametrize(
    "score", ["NaN", "nan", "inf", "-inf", "1e400", "0x10", "1_000", "4,5", "", "three", "True", "٣", "1 2"]
)
def test_a_text_that_is_no_number_is_a_fault(tmp_path, score):  # fmt: skip
    quoted = f'"{score}"'
    for label_format, text, place in (
        ("released-test", annotations(("a.mp4", score)), "3: annotations[0]"),
        ("name-x-y-mos", f"a.mp4, -1, -1, {quoted}", "1"),
        ("name-seconds-fps-mos", f"a.mp4, 8, 30, {quoted}", "1"),
        ("csv", f"name,mos\na.mp4,{quoted}", "2"),
    ):
        chosen, rows, faults = read(tmp_path, text)
        assert (chosen, rows, [fault.place for fault in faults]) == (label_format, [], [place])
        assert f"must be a finite number, got {score!r}" in faults[0].reason


@pytest.mark.parametrize("score", ["true", "null", '"3"', "NaN", "-Infinity", "1e400", "[3]"])
def test_a_json_value_that_is_no_number_is_a_fault(tmp_path, score):
    lists = '[{"img_path": "b.mp4", "gt_score": 1},\n{"img_path": "a.mp4", "gt_score": ?}]'.replace("?", score)
    _, rows, faults = read(tmp_path, lists)
    assert ([row.path for row in rows], [fault.place for fault in faults]) == (["b.mp4"], ["2: list[1]"])
    _, rows, faults = read(tmp_path, train_line() + "\n" + train_line("a.mp4", score="?").replace('"?"', score))
    assert (len(rows), [fault.place for fault in faults]) == (1, ["2"])
    assert "number" in faults[0].reason


@pytest.mark.parametrize("score", ["62.4", "true", "null"])
def test_a_released_test_score_is_a_text(tmp_path, score):
    _, _, faults = read(tmp_path, annotations(("a.mp4", "?")).replace('"?"', score))
    assert [fault.place for fault in faults] == ["3: annotations[0]"] and "must be a text" in faults[0].reason


def test_spaces_around_a_number_are_stripped_in_text_only(tmp_path):
    assert read(tmp_path, "a.mp4,-1,-1,  3 ")[1][0].mos == 3
    assert "finite number, got ' 3 '" in read(tmp_path, annotations(("a.mp4", " 3 ")))[2][0].reason


@pytest.mark.parametrize(
    ("label_format", "text", "place", "says"),
    [
        ("project", PROJECT + PROJECT.replace('"dataset"', '"data"'), "2", "no dataset"),
        ("project", PROJECT + '{"path": "b.mp4"', "2", "not JSON"),
        ("project", PROJECT + PROJECT.replace("a.mp4", "b.mp4").replace("7", "1e400"), "2", "JSON compliant"),
        ("project", PROJECT + PROJECT.replace("a.mp4", "b.mp4").replace('"D"', r'"\ud800"'), "2", "surrogates"),
        ("released-train", train_line() + "\n" + train_line("b.mp4", image="b.mp4"), "2", "one file name"),
        ("released-train", train_line() + "\n" + train_line("b.mp4", image=["b.mp4", "c.mp4"]), "2", "one file name"),
        ("released-train", train_line() + "\n" + train_line("b.mp4", conversations=[]), "2", "one answer from 'gpt'"),
        ("released-train", train_line() + '\n{"image": ["b.mp4"]}', "2", "no conversations, dataset_name"),
        ("released-test", annotations(("a", "1")).replace("image_id", "id"), "3: annotations[0]", "no image_id"),
        ("released-test", annotations(("a", "1")).replace('"score",', '"level",'), "3: annotations[0]", "ann_type"),
        ("released-test", '{"annotations": [\n7]}', "2: annotations[0]", "expected a JSON object"),
        ("released-test", annotations(("a", "1"), ("b", "2"))[:-8], "12", "not JSON"),
        ("released-test", annotations(("a", "1")) + "x", "8", "end of the list"),
        ("score-list", '[{"img_path": "a", "gt_score": 1}\n {"img_path": "b", "gt_score": 1}]', "2", "Expecting ','"),
        ("score-list", '[{"img_path": "a", "gt_score": 1},\n]', "2", "not JSON"),
        ("score-list", '[\n{"file": "a", "gt_score": 1}]', "2: list[0]", "neither"),
        ("score-list", '[\n{"img_path": "a", "image": "a", "gt_score": 1}]', "2: list[0]", "img_path and image"),
        ("score-list", '[\n{"img_path": "a", "gt_score": 1, "split": "test"}]', "2: list[0]", "split: .* rename it"),
        ("name-x-y-mos", "a.mp4, -1, -1, 1\nb.mp4, -1, 1", "2", "expected 4 columns, got 3"),
        ("name-x-y-mos", "a.mp4, -1, -1, 1\nb.mp4, 8, 30, 1", "2", "must be -1"),
        ("name-x-y-mos", 'a.mp4, -1, -1, 1\n"b.mp4, -1, -1, 1\nc.mp4, -1, -1, 1', "2", "not comma-separated"),
        ("name-seconds-fps-mos", "a.mp4, 8, 30, 1\nb.mp4, -1, -1, 1", "2", "seconds must be above 0"),
        ("name-seconds-fps-mos", "a.mp4, 8, 30, 1\nb.mp4, 8, 0, 1", "2", "fps must be above 0"),
        ("csv", "name,mos,x\na.mp4,1,2\nb.mp4,1", "3", "expected 3 columns, got 2"),
        ("csv", "name,path,mos\na.mp4,a.mp4,1", "1", "file name, it has 2 candidates: name, path"),
        ("csv", "name,mos,score\na.mp4,1,1", "1", "score, it has 2 candidates: mos, score"),
        ("csv", "name,mos,x,x\na.mp4,1,1,1", "1", "a column twice: x"),
        ("csv", "name,mos,split\na.mp4,1,test", "2", "split: .* rename it"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_place_and_the_rest_is_read(tmp_path, label_format, text, place, says):
    chosen, _, faults = read(tmp_path, text)
    assert chosen == label_format and [fault.place for fault in faults] == [place]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(faults[0].reason)


BAD_PATHS = ["", ".", "/etc/passwd", "../a.mp4", "x/../../a.mp4", "a\0.mp4"]


def with_paths(label_format, paths):
    """A file of one format with these paths; the score is 3 everywhere."""
    quoted = [json.dumps(path) for path in paths]
    cells = [f'"{path}"' for path in paths]
    return {
        "project": "\n".join(PROJECT.strip().replace('"a.mp4"', path) for path in quoted),
        "released-train": "\n".join(train_line(path, 3) for path in paths),
        "released-test": annotations(*((path, "3") for path in paths)),
        "score-list": json.dumps([{"img_path": path, "gt_score": 3} for path in paths], indent=0),
        "name-x-y-mos": "\n".join(f"{cell}, -1, -1, 3" for cell in cells),
        "name-seconds-fps-mos": "\n".join(f"{cell}, 8, 30, 3" for cell in cells),
        "csv": "\n".join(["name,mos", *(f"{cell},3" for cell in cells)]),
    }[label_format]


@pytest.mark.parametrize("label_format", FORMATS)
def test_paths_that_are_no_file_names_in_the_folder_are_faults(tmp_path, label_format):
    _, rows, faults = read(tmp_path, with_paths(label_format, ["good.mp4", *BAD_PATHS]), label_format)
    assert [row.path for row in rows] == ["good.mp4"]
    assert len(faults) == len(BAD_PATHS) and not any(fault.duplicate for fault in faults)


@pytest.mark.parametrize("label_format", FORMATS)
def test_a_path_comes_once_however_it_is_written(tmp_path, label_format):
    paths = ["x/a.mp4", "b.mp4", "./x/a.mp4", "x//a.mp4", "x/A.mp4"]
    _, rows, faults = read(tmp_path, with_paths(label_format, paths))
    assert [row.path for row in rows] == ["x/a.mp4", "b.mp4", "x/A.mp4"]
    assert [fault.duplicate for fault in faults] == [True, True]
    assert all(fault.reason.endswith(f"is already on line {rows[0].place}") for fault in faults)


@pytest.mark.parametrize("label_format", FORMATS)
def test_scores_are_inside_the_stated_range_ends_included(tmp_path, label_format):
    text = with_paths(label_format, ["a.mp4"])
    assert read(tmp_path, text, mos_range=(3, 4))[2] == read(tmp_path, text, mos_range=(2, 3))[2] == []
    for wrong in ((1, 2.99), (3.01, 5)):
        _, rows, (fault,) = read(tmp_path, text, mos_range=wrong)
        assert rows == [] and "mos 3.0 is outside the stated range" in fault.reason


@pytest.mark.parametrize("label_format", FORMATS)
def test_byte_order_mark_and_other_encodings(tmp_path, label_format):
    text = with_paths(label_format, ["é.mp4", "b.mp4"]).replace(r"\u00e9", "é")
    for content in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        with pytest.raises(ValueError, match=r"labels:1: starts with a byte order mark"):
            read(tmp_path, content)
        _, rows, faults = read(tmp_path, content, label_format)
        assert faults[0].place == "1" and "byte order mark" in faults[0].reason
        assert "é.mp4" not in [row.path for row in rows]
    latin = text.encode("latin-1")
    _, _, faults = read(tmp_path, latin)
    line = latin[: latin.index(b"\xe9")].count(b"\n") + 1
    assert [fault.place for fault in faults] == [str(line)] and "utf-8" in faults[0].reason


@pytest.mark.parametrize(
    "content", ["", "\n", "I07.png I07_01_01.png 4.56 0.70\n", "a,b\n1,2", "{}", "[1]", '{"annotations": 3}', "7"]
)
def test_an_unknown_format_is_refused_with_what_was_tried(tmp_path, content):  # fmt: skip
    with pytest.raises(ValueError, match=r"labels: no known label format fits \(") as caught:
        read(tmp_path, content)
    assert all(f"{name}: " in str(caught.value) for name in FORMATS) and "\n" not in str(caught.value)


def test_the_format_can_be_forced(tmp_path):
    assert read(tmp_path, "\n7", "score-list") == (
        "score-list",
        [],
        [("1", "does not start as this format does", False)],
    )
    assert read(tmp_path, "[ ]", "score-list") == ("score-list", [], [])
    assert [fault.place for fault in read(tmp_path, PROJECT, "name-x-y-mos")[2]] == ["1"]


def test_two_fitting_formats_are_told_apart_by_the_reader_of_the_message(tmp_path):
    both = train_line(path="a.mp4", mos=3)[:-1] + ', "path": "a.mp4"}'
    with pytest.raises(ValueError, match="name one with --label-format: project, released-train"):
        read(tmp_path, both)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"labels cannot be read: Is a directory"):
        (tmp_path / "labels").mkdir()
        open_labels(tmp_path / "labels")


def test_csv_names_get_the_extension_of_the_file_on_disk(tmp_path):
    for name in (
        "one.mp4",
        "two.mp4",
        "two.mkv",
        "three.webm",
        "four.avi",
        "four.mov",
        "dot.ed.mp4",
        "MP.MP4",
        "MP.MP4.mp4",
    ):
        (tmp_path / name).touch()
    names = ["one", "two", "three", "four", "dot.ed", "MP.MP4", "none", "no.mkv"]
    _, rows, faults = read(tmp_path, "name,mos\n" + "".join(f"{name},3\n" for name in names), videos=tmp_path)
    completed = ["one.mp4", "two.mp4", "three.webm", "dot.ed.mp4", "MP.MP4", "none", "no.mkv"]
    assert [row.path for row in rows] == completed
    assert [(fault.place, fault.reason) for fault in faults] == [
        ("5", "several files match the name 'four': four.avi, four.mov")
    ]
    _, rows, faults = read(tmp_path, "name,mos\none,3\none.mp4,3\n", videos=tmp_path)
    assert len(rows) == 1 and faults[0].duplicate


FUZZ = """
import pathlib, random, sys, time
from data.label_formats import FORMATS, open_labels, read_rows
folder, cases = pathlib.Path(sys.argv[1]), int(sys.argv[2])
generator, start, refused, read = random.Random(0), time.monotonic(), 0, 0
for case in range(cases):
    for label_format in FORMATS:
        content = bytearray((folder / label_format).read_bytes())
        for _ in range(generator.choice((1, 2, 8))):
            at = generator.randrange(len(content))
            content[at] = generator.choice((generator.randrange(256), *b'"{}[],:\\\\\\n-0'))
        file = folder / "fuzzed"
        file.write_bytes(content)
        for forced in (None, label_format):
            try:
                rows, faults = read_rows(*open_labels(file, forced))
            except ValueError as error:
                assert forced is None and str(file) in str(error), error
                refused += 1
            else:
                assert all(row.mos == row.mos and row.path for row in rows)
                assert all(fault.place and fault.reason for fault in faults)
                read += 1
print(refused, read)
"""


def test_flipped_bytes_give_rows_or_an_error_that_names_the_file(tmp_path):
    for label_format in FORMATS:
        text = with_paths(label_format, ["a.mp4", "ü/b c.mp4", "c.mp4"])
        (tmp_path / label_format).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path), "500"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, accepted = map(int, done.stdout.split())
    assert refused + accepted == 500 * len(FORMATS) * 2 and refused > 100 and accepted > 3500


ASSETS = os.environ.get("VQA_TEST_ASSETS")
LABELS = Path(ASSETS or "", "labels")
needs_assets = pytest.mark.skipif(not ASSETS, reason="VQA_TEST_ASSETS names no folder with the field's label files")


@needs_assets
@pytest.mark.parametrize(
    ("file", "label_format", "count", "lowest", "highest"),
    [
        ("annotations_json/CGVDS_total_score.json", "released-test", 357, 1.71, 6.06),
        ("annotations_json/Konvid-1k_total_ds_score.json", "released-test", 1200, 24.4, 92.8),
        ("annotations_json/LIVE-VQC_total_ds_score.json", "released-test", 585, 6.2, 94.3),
        ("annotations_json/LIVE-YT-Gaming_total_score.json", "released-test", 600, 4.5, 96.0),
        ("annotations_json/LSVQ_whole_test_1080p_ds_score.json", "released-test", 3573, 17.7, 91.4),
        ("annotations_json/LSVQ_whole_test_ds_score.json", "released-test", 7182, 8.5, 91.0),
        ("annotations_json/VDPVE_train_score.json", "released-test", 839, 19.9, 84.4),
        ("annotations_json/Waterloo_IVC_4K_total_score.json", "released-test", 1200, 0.7, 97.6),
        ("annotations_json/live_hfr_total_score.json", "released-test", 480, 10.4, 73.9),
        ("annotations_json/youtube_ugc_total.json", "released-test", 1020, 1.24, 4.68),
        ("annotations_json/qalign_konvid.json", "score-list", 1200, 1.22, 4.64),
        ("txt/LSVQ_train_labels.txt", "name-x-y-mos", 28056, 2.45, 90.5),
        ("txt/LSVQ_labels_test.txt", "name-x-y-mos", 7186, 8.5, 91.0),
        ("txt/LSVQ_labels_1080p.txt", "name-x-y-mos", 3573, 17.7, 91.4),
        ("txt/YouTubeUGC_labels.txt", "name-x-y-mos", 1147, 1.24, 4.68),
        ("txt/KoNViD_labels.txt", "name-seconds-fps-mos", 1200, 1.22, 4.64),
        ("txt/LIVE_VQC_labels.txt", "name-seconds-fps-mos", 585, 6.2, 94.3),
        ("csv/LSVQ_whole_test_1080p.csv", "csv", 3561, 17.7, 91.4),
    ],
)
def test_real_files(file, label_format, count, lowest, highest):
    chosen, content = open_labels(LABELS / file)
    rows, faults = read_rows(chosen, content)
    assert (chosen, len(rows), faults) == (label_format, count, [])
    scores = [row.mos for row in rows]
    assert (min(scores), max(scores)) == (pytest.approx(lowest, abs=0.051), pytest.approx(highest, abs=0.051))


@needs_assets
def test_the_real_image_list_is_refused():
    with pytest.raises(ValueError, match="no known label format fits"):
        open_labels(LABELS / "txt/KADID-10K_val_set.txt")


@needs_assets
def test_real_csv_agrees_with_the_real_text_list_once_its_names_are_completed(tmp_path):
    """The csv has 12 clips fewer than the list; the scores of the clips in both are the same."""
    text_rows, _ = read_rows("name-x-y-mos", (LABELS / "txt/LSVQ_labels_1080p.txt").read_bytes())
    expected = {row.path: row.mos for row in text_rows}
    for path in expected:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    rows, faults = read_rows("csv", (LABELS / "csv/LSVQ_whole_test_1080p.csv").read_bytes(), videos=tmp_path)
    assert faults == [] and len(rows) == 3561
    assert {row.path for row in rows} <= expected.keys()
    assert all(row.mos == pytest.approx(expected[row.path], abs=1e-6) for row in rows)
    assert rows[0].extra["p1"] == "[263, 1031, 251, 683, 0, 168]" and len(rows[0].extra) == 35
