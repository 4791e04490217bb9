"""The table of benchmarks against hand-picked names and, where they are at hand, the released test lists; and the
table of the motion benchmark."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data.benchmarks import BENCHMARKS, FILE
from data.label_formats import FORMATS, misfits, read_rows
from data.labels import Clip
from tests.benchmarks import motion

ROOT = Path(__file__).resolve().parents[1]


def test_the_ten_benchmarks_of_the_paper():
    assert len(BENCHMARKS) == 10
    assert all(low < high for benchmark in BENCHMARKS.values() for low, high in [benchmark.mos_range])


def test_entries_hold_what_the_file_says_of_itself():
    content = json.loads(FILE.read_text(encoding="utf-8"))
    assert {key for entry in content["benchmarks"].values() for key in entry} <= content["notes"].keys()
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.domain == "in"} == {"LSVQ-test", "LSVQ-1080p"}
    assert {benchmark.domain for benchmark in BENCHMARKS.values()} == {"in", "ood"}
    for benchmark in BENCHMARKS.values():
        assert benchmark.videos.keys() <= FORMATS.keys() and "released-test" in benchmark.videos
        assert (
            {"VQAThinker", "Q-Align", "VQA2-Scorer", "DOVER"} <= benchmark.published.keys() <= content["sources"].keys()
        )
        for figures in benchmark.published.values():
            assert figures.keys() == {"srcc", "plcc"} and all(0 < figure < 1 for figure in figures.values())
    assert all(content["benchmarks"][name]["mos_range"] == list(b.mos_range) for name, b in BENCHMARKS.items())
    assert (ROOT / "docs" / "benchmarks.json").samefile(FILE)


# Benchmarks with figures, and the sums of their SRCC and of their PLCC: the columns of the published table, by awk.
PUBLISHED = {
    "VQAThinker": (10, 7.660, 7.909),
    "VersusQ": (7, 5.472, 5.699),
    "W2S-VQA": (9, 7.175, 7.442),
    "Q-Align": (10, 6.889, 7.216),
    "VQA2-Scorer": (10, 6.849, 7.244),
    "DOVER": (10, 6.818, 7.158),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_figures_add_up(model):
    figures = [b.published[model] for b in BENCHMARKS.values() if model in b.published]
    sums = (sum(figure[metric] for figure in figures) for metric in ("srcc", "plcc"))
    assert (len(figures), *(round(total, 3) for total in sums)) == PUBLISHED[model]


def test_the_file_is_installed_beside_its_module(tmp_path):
    library = tmp_path / "library"
    build = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(library)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    code = "from data.benchmarks import BENCHMARKS, FILE; print(len(BENCHMARKS), FILE)"
    done = subprocess.run([sys.executable, "-c", code], cwd=library, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["10", str(library / "data" / "benchmarks.json")]


def test_only_konvid_has_another_scale_in_the_released_list():
    assert BENCHMARKS["KoNViD-1k"].range_in("released-test") == (20, 100)
    for label_format in ("score-list", "csv", "name-x-y-mos"):
        assert BENCHMARKS["KoNViD-1k"].range_in(label_format) == (1, 5)
    others = [benchmark for name, benchmark in BENCHMARKS.items() if name != "KoNViD-1k"]
    assert all(benchmark.range_in("released-test") == benchmark.mos_range for benchmark in others)


@pytest.mark.parametrize(
    ("name", "path", "source"),
    [
        ("LIVE-YT-HFR", "1Runner_crf_0_24fps.mp4", "1Runner"),
        ("LIVE-YT-HFR", "a_crf_1_2fps/bobblehead_crf_63_120fps.webm", "a"),
        ("LIVE-YT-HFR", "videos/3Runners_crf_63_98fps.mp4", "3Runners"),
        ("Waterloo-IVC-4K", "HEVC_01_960x540_1.mp4", "01"),
        ("Waterloo-IVC-4K", "dir_x/AVS2_20_3840x2160_4", "20"),
        ("CGVDS", "Overwatch_30_30fps_640x480_30_300_h264_nvenc.mp4", "Overwatch"),
        ("CGVDS", "Overwatch_2_30_1920x1080_60_50000_h264_nvenc.mp4", "Overwatch"),
        ("CGVDS", "game_videos/LoL_TF_30s_1_30_640x480_60_2000_h264_nvenc.mp4", "LoL"),
        ("CGVDS", "GTA5_30_1280x720_20_300_h264_nvenc.mp4", "GTA5"),
        ("VDPVE", "A0023_01.mp4", "A0023"),
        ("VDPVE", "train/C0058_04.mp4", "C0058"),
    ],
)
def test_source_of_a_name(name, path, source):
    assert re.search(BENCHMARKS[name].source, path)[1] == source


ASSETS = os.environ.get("VQA_TEST_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="VQA_TEST_ASSETS names no folder with the field's label files")
LISTS = {
    "LSVQ-test": "LSVQ_whole_test_ds_score.json",
    "LSVQ-1080p": "LSVQ_whole_test_1080p_ds_score.json",
    "KoNViD-1k": "Konvid-1k_total_ds_score.json",
    "LIVE-VQC": "LIVE-VQC_total_ds_score.json",
    "YouTube-UGC": "youtube_ugc_total.json",
    "LIVE-YT-Gaming": "LIVE-YT-Gaming_total_score.json",
    "CGVDS": "CGVDS_total_score.json",
    "LIVE-YT-HFR": "live_hfr_total_score.json",
    "Waterloo-IVC-4K": "Waterloo_IVC_4K_total_score.json",
    "VDPVE": "VDPVE_train_score.json",
}
OTHER_LISTS = {
    ("LSVQ-test", "name-x-y-mos"): "txt/LSVQ_labels_test.txt",
    ("LSVQ-1080p", "name-x-y-mos"): "txt/LSVQ_labels_1080p.txt",
    ("LSVQ-1080p", "csv"): "csv/LSVQ_whole_test_1080p.csv",
    ("KoNViD-1k", "score-list"): "annotations_json/qalign_konvid.json",
    ("KoNViD-1k", "name-seconds-fps-mos"): "txt/KoNViD_labels.txt",
    ("LIVE-VQC", "name-seconds-fps-mos"): "txt/LIVE_VQC_labels.txt",
    ("YouTube-UGC", "name-x-y-mos"): "txt/YouTubeUGC_labels.txt",
}
# Sources and the clips that the smallest and the largest one have; counted with grep, sort and uniq.
SOURCES = {"CGVDS": (15, 16, 26), "LIVE-YT-HFR": (16, 30, 30), "Waterloo-IVC-4K": (20, 60, 60), "VDPVE": (128, 5, 8)}


@needs_assets
@pytest.mark.parametrize("name", BENCHMARKS)
def test_released_list_is_inside_the_scale_and_its_names_fit_the_pattern(name):
    benchmark = BENCHMARKS[name]
    content = Path(ASSETS, "labels", "annotations_json", LISTS[name]).read_bytes()
    rows, faults = read_rows("released-test", content, benchmark.range_in("released-test"))
    assert rows and faults == []
    assert (benchmark.source is None) == (name not in SOURCES)
    if benchmark.source is not None:
        clips = Counter(re.search(benchmark.source, row.path)[1] for row in rows)
        assert (len(clips), min(clips.values()), max(clips.values())) == SOURCES[name]


@needs_assets
@pytest.mark.parametrize(("name", "label_format"), [(n, f) for n, b in BENCHMARKS.items() for f in b.videos])
def test_a_list_is_in_its_format_and_as_long_as_stated(name, label_format):
    file = f"annotations_json/{LISTS[name]}" if label_format == "released-test" else OTHER_LISTS[name, label_format]
    content = Path(ASSETS, "labels", file).read_bytes()
    assert [known for known, reason in misfits(content).items() if reason is None] == [label_format]
    rows, faults = read_rows(label_format, content, BENCHMARKS[name].range_in(label_format))
    assert len(rows) == BENCHMARKS[name].videos[label_format] and faults == []


@needs_assets
def test_released_konvid_is_twenty_times_the_mos():
    folder = Path(ASSETS, "labels")
    released, _ = read_rows("released-test", (folder / "annotations_json" / LISTS["KoNViD-1k"]).read_bytes())
    own, _ = read_rows("name-seconds-fps-mos", (folder / "txt" / "KoNViD_labels.txt").read_bytes())
    scores = {Path(row.path).name: row.mos for row in own}
    assert all(row.mos == pytest.approx(20 * scores[row.path], abs=1e-3) for row in released)


# ---- tests.benchmarks.motion


def a_clip(path, mos, *names):
    return Clip(path, mos, (1.0, 5.0), "synthetic", "test", {"severities": dict.fromkeys(names, 0.5)})


def test_stuttering_clips_are_those_with_that_distortion_alone_or_beside_another():
    clips = [a_clip("a", 1, "stutter"), a_clip("b", 2, "blur"), a_clip("c", 3, "noise", "stutter"), a_clip("d", 4)]
    assert [clip.path for clip in motion.with_stutter(clips)] == ["a", "c"]


def test_the_motion_table_takes_both_models_on_the_same_clips(tmp_path):
    test = [a_clip("a", 1, "stutter"), a_clip("b", 2, "stutter"), a_clip("c", 3, "stutter"), a_clip("d", 4)]
    fresh = [a_clip("e", 1, "stutter"), a_clip("f", 2, "stutter"), a_clip("g", 3, "stutter")]
    told = {  # with motion, seeds 0 and 1: right, and right but for the clip that does not stutter; without: reversed
        ("with motion token", 0): ({"a": 1, "b": 2, "c": 3, "d": 4}, {"e": 2, "f": 3, "g": 4}),
        ("with motion token", 1): ({"a": 2, "b": 3, "c": 4, "d": 1}, {"e": 2, "f": 2, "g": 2}),
        ("without", 0): ({"a": 4, "b": 3, "c": 2, "d": 1}, {"e": 3, "f": 2, "g": 1}),
    }
    for (variant, seed), (on_test, on_fresh) in told.items():
        run = motion.folder(tmp_path, variant, seed)
        run.mkdir()
        (run / motion.SCORES).write_text(json.dumps({"test": on_test, "fresh": on_fresh}))
    table = motion.table(tmp_path, [0, 1], {"test": (tmp_path, test), "fresh": (tmp_path, fresh)})
    assert table.splitlines()[2:] == [
        "| demo's test split | 4 | with motion token | 2 | 0.400 (-0.200 to 1.000) | 0.400 (-0.200 to 1.000) |",
        "| demo's test split | 4 | without | 1 | -1.000 (-1.000 to -1.000) | -1.000 (-1.000 to -1.000) |",
        "| of these, stuttering | 3 | with motion token | 2 | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) |",
        "| of these, stuttering | 3 | without | 1 | -1.000 (-1.000 to -1.000) | -1.000 (-1.000 to -1.000) |",
        "| fresh, stuttering | 3 | with motion token | 2 | 1.000 (1.000 to 1.000), 1 undefined "
        "| 1.000 (1.000 to 1.000), 1 undefined |",
        "| fresh, stuttering | 3 | without | 1 | -1.000 (-1.000 to -1.000) | -1.000 (-1.000 to -1.000) |",
    ]


def test_the_figures_to_expect_are_the_published_ones():
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (0\.\d{3}) \| (0\.\d{3}) \|$", page, re.MULTILINE)
    published = {name: benchmark.published["VQAThinker"] for name, benchmark in BENCHMARKS.items()}
    assert {name: {"srcc": float(srcc), "plcc": float(plcc)} for name, srcc, plcc in rows} == published
