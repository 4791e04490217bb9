"""The page about an evaluation: its numbers against slow versions, its form, and text that would be markup."""

import base64
import doctest
import io
import math
import random
import re

import av
import numpy as np
import pytest
import torch

from grpo import charts
from grpo.charts import Axes, tick_step, ticks, whole_ticks
from grpo.page import thumbnail
from grpo.report import write_report
from tests.pages import Page, check, chromium, console, tables
from tests.results import measured, row, some_rows, write_evaluation

HOSTILE = "\"><img src=x onerror=alert(1)>'&amp;{{ 7 * 7 }}"


def no_frames(dataset, path):
    return None


def no_fit(scores, targets):
    return None, "for no reason"


def report(folder, frames=no_frames, fit=no_fit):
    size = write_report(folder, folder / "pages" / "report.html", frames, fit)
    assert size == (folder / "pages" / "report.html").stat().st_size
    page = Page(folder / "pages" / "report.html")
    check(page)
    return page


@pytest.fixture(scope="module")
def rows():
    return some_rows(150)


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory):
    return report(write_evaluation(tmp_path_factory.mktemp("evaluation"), {"KoNViD": rows}))


def pictures(page):
    """The JPEG files of a page, and what is in them: float (3, H, W)."""
    files = [base64.b64decode(image["src"].split(",")[1]) for image in page.of("img")]
    return files, [decoded(file) for file in files]


def decoded(jpeg):
    with av.open(io.BytesIO(jpeg)) as file:
        return torch.from_numpy(next(file.decode(video=0)).to_ndarray(format="rgb24")).permute(2, 0, 1).float()


def numbers(rows):
    """(score, target) of the rows that have a score."""
    return [(float(row["score"]), float(row["target"])) for row in rows if row["score"] is not None]


def slow_bins(pairs, column, width):
    """Every bin from 1 to 5, one look at every pair for each."""
    for k in range(round(4 / width)):
        low, high = 1 + k * width, 1 + (k + 1) * width
        inside = [pair for pair in pairs if low <= pair[column] < high or (high == 5 and pair[column] == 5)]
        yield f"{low:.2f} to {high:.2f}", inside


def test_bins_are_those_of_a_slow_version(page, rows):
    pairs, shown = numbers(rows), tables(page)
    assert any(score in (1.0, 1.5, 2.0) for score, _ in pairs) and any(target == 5 for _, target in pairs)
    calibration, residuals, histogram = [], [], []
    for span, inside in slow_bins(pairs, 0, 0.5):
        if inside:
            means = [sum(column) / len(inside) for column in zip(*inside)]
            calibration.append([span, str(len(inside)), *(f"{mean:.3f}" for mean in means)])
    for span, inside in slow_bins(pairs, 1, 0.5):
        if inside:
            errors = [score - target for score, target in inside]
            mean = sum(errors) / len(errors)
            squares = sum((error - mean) ** 2 for error in errors)
            std = f"{math.sqrt(squares / (len(errors) - 1)):.3f}" if len(errors) > 1 else "–"
            residuals.append([span, str(len(inside)), f"{mean:+.3f}", std])
    for (span, by_score), (_, by_target) in zip(slow_bins(pairs, 0, 0.25), slow_bins(pairs, 1, 0.25)):
        if by_score or by_target:
            histogram.append([span, str(len(by_score)), str(len(by_target))])
    assert shown["Calibration in numbers"][1:] == calibration
    assert shown["Residuals in numbers"][1:] == residuals
    assert shown["Histogram in numbers"][1:] == histogram
    assert sum(int(line[1]) for line in histogram) == sum(int(line[2]) for line in histogram) == len(pairs)


def test_dots_are_where_the_scores_are(page, rows):
    drawn = "".join(path["d"] for path in page.of("path") if path.get("class") == "dots stroke-0")
    scatter = re.findall(r"M([\d.]+) ([\d.]+)h0", drawn)
    unit_x, unit_y = (charts.RIGHT - charts.LEFT) / 4, (charts.BOTTOM - charts.TOP) / 4
    found = [(1 + (float(x) - charts.LEFT) / unit_x, 1 + (charts.BOTTOM - float(y)) / unit_y) for x, y in scatter]
    assert np.allclose(found, numbers(rows), atol=0.002)


def test_best_and_worst_are_those_of_a_slow_version(page, rows):
    pairs = {row["path"]: abs(float(row["score"]) - float(row["target"])) for row in rows if row["score"] is not None}
    left, best, worst = list(pairs), [], []
    for _ in range(10):
        best.append(min(left, key=pairs.get))
        left.remove(best[-1])
    for _ in range(10):
        worst.append(max(left, key=pairs.get))
        left.remove(worst[-1])
    shown = page.texts("strong")
    assert [pairs[path] for path in shown[:40:2]] == [pairs[path] for path in [*best, *worst]]
    by_path = {row["path"]: row for row in rows}
    assert shown[1:40:2] == [f"{by_path[path]['score']:.2f}" for path in shown[:40:2]]
    assert page.texts("blockquote") == [by_path[path]["reasoning"] for path in shown[:40:2]]
    for path, text in zip(shown[:40:2], [text for text in page.texts("p") if text.startswith("score ")]):
        error = by_path[path]["score"] - float(by_path[path]["target"])
        assert float(re.search(r"error ([+-][\d.]+)", text)[1]) == pytest.approx(error, abs=0.0051)
    assert [text.split(":")[1] for text in page.texts("h3")[:2]] == [
        " the 10 with the smallest |score − MOS|", " the 10 with the largest |score − MOS|"
    ]  # fmt: skip


@pytest.mark.parametrize(("scored", "best", "worst"), [(0, 0, 0), (1, 1, 0), (2, 1, 1), (7, 4, 3), (20, 10, 10)])
def test_no_video_is_among_the_best_and_the_worst(tmp_path, scored, best, worst):
    rows = [row(f"{k}.mp4", 3.0, 3.0 + k / 50) for k in range(scored)] + [row("lost.mp4", 2.0, None)]
    page = report(write_evaluation(tmp_path, {"few": rows}))
    shown = page.texts("strong")[::2]
    assert shown == [f"{k}.mp4" for k in range(best)] + [f"{scored - 1 - k}.mp4" for k in range(worst)]
    headings = [re.search(r"the (\d+) with", text) for text in page.texts("h3")]
    assert [int(found[1]) for found in headings if found] == [number for number in (best, worst) if number]
    assert f"{scored} of {scored + 1} videos have a score" in " ".join(page.texts("p"))


def test_what_has_no_score_is_listed_by_reason(tmp_path):
    rows = [row(f"{k}.mp4", 2.0, None) for k in range(3)]
    rows += [row(f"b{k}.mp4", 2.0, None, status="unparsed", reason="no_answer") for k in range(12)]
    page = report(write_evaluation(tmp_path, {"lost": rows}))
    assert page.texts("summary") == ["unparsed: no_answer (12)", "unreadable: missing (3)"]
    first, second = (re.findall(r"\S+\.mp4", text) for text in page.texts("details"))
    assert first == [f"b{k}.mp4" for k in range(12)] and second == ["0.mp4", "1.mp4", "2.mp4"]


def test_a_figure_that_is_not_defined_is_a_dash_with_its_reason(tmp_path):
    rows = some_rows(20)
    undefined = {"srcc": "all scores are equal", "krcc": "all scores are equal", "plcc_fitted": "did not converge"}
    bad = measured(rows, **dict.fromkeys(undefined), undefined=undefined, intervals={"plcc": [0.1, 0.25], "level": 0.9})
    mean = {"scored": 18, "listed": 20, "srcc": 0.123, "left_out": {"srcc": ["bad", "worse"]}}
    sets = {"good": measured(rows), "bad": bad}
    page = report(write_evaluation(tmp_path, dict.fromkeys(sets, rows), datasets=sets, means={"ood": mean}))
    header, good, shown = tables(page)["Metrics of each data set"]
    assert header == ["data set", "scored", "SRCC ↑", "KRCC ↑", "PLCC ↑", "PLCC fitted ↑", "RMSE ↓", "RMSE fitted ↓"]
    assert good == ["good", "18 of 20", "0.500", "0.600", "0.700", "0.800", "0.900", "1.000"]
    assert shown == ["bad", "18 of 20", "–", "–", "0.700 [0.100, 0.250]", "–", "0.900", "1.000"]
    notes = page.texts("li")
    assert "bad: no SRCC, KRCC: all scores are equal" in notes and "bad: no PLCC fitted: did not converge" in notes
    assert any("↑ higher is better" in note for note in notes)
    assert "In brackets: the 90% interval from resampling the videos." in notes
    assert tables(page)["Means, weighted by the videos that have a score"][1] == ["out-of-domain", "18 of 20", "0.123"]
    assert "out-of-domain: SRCC without bad, worse" in notes


def test_text_from_outside_stays_text(tmp_path):
    name = HOSTILE.replace("/", "")
    rows = [
        row(f"{HOSTILE}{k}.mp4", 1 + k, 3.0, reasoning=f"<script>alert(1)</script>{HOSTILE}", flags=HOSTILE)
        for k in range(5)
    ]
    rows.append(row(HOSTILE, 2.0, None, status=HOSTILE, reason=HOSTILE))
    rows.append(row("caf\udce9.mp4", 2.0, None))  # a file name that is no UTF-8
    outside = {name: HOSTILE for name in ("model", "command")}
    outside |= {name: {HOSTILE: HOSTILE} for name in ("recipe", "scoring", "versions")}
    folder = write_evaluation(tmp_path, {name: rows}, **outside)
    page = report(
        folder, lambda dataset, path: torch.zeros(1, 3, 4, 4, dtype=torch.uint8), lambda s, t: (None, HOSTILE)
    )
    assert page.texts("blockquote") == [f"<script>alert(1)</script>{HOSTILE}"] * 5
    assert page.texts("h1") == [f"Video quality scores of {HOSTILE}"] and name in page.texts("h2")
    assert sorted(page.texts("strong")[::2]) == [f"{HOSTILE}{k}.mp4" for k in range(5)]
    assert page.texts("summary")[-2:] == [f"{HOSTILE}: {HOSTILE} (1)", "unreadable: missing (1)"]
    assert page.texts("dd").count(HOSTILE) == 5 and page.texts("dt").count(HOSTILE) == 3
    assert "49" not in page.texts("title")[0] and len(page.of("img")) == 5


def test_pictures_are_evenly_chosen_small_and_counted(tmp_path):
    rows = [row("wide.mp4", 3.0, 3.0), row("small.mp4", 3.0, 3.5), row("lost.mp4", 3.0, 4.0)]

    def frames(dataset, path):
        assert dataset == "one"
        shape = {"wide.mp4": (11, 3, 180, 640), "small.mp4": (2, 3, 20, 30)}.get(path)
        grey = torch.arange(shape[0]).mul(20).to(torch.uint8) if shape else None
        return grey[:, None, None, None].expand(shape) if shape else None

    page = report(write_evaluation(tmp_path, {"one": rows}), frames)
    files, shown = pictures(page)
    assert [tuple(picture.shape) for picture in shown] == [(3, 45, 160)] * 6 + [(3, 20, 30)] * 2
    levels = [picture.mean().item() for picture in shown]
    assert levels == pytest.approx([0, 40, 80, 120, 160, 200, 0, 20], abs=2)
    sizes = [(image["width"], image["height"]) for image in page.of("img")]
    assert sizes == [("160", "45")] * 6 + [("30", "20")] * 2
    alts = [image["alt"] for image in page.of("img")]
    assert alts == [f"frame {k} of 6 of wide.mp4" for k in range(1, 7)] + [
        "frame 1 of 2 of small.mp4",
        "frame 2 of 2 of small.mp4",
    ]
    assert "6 of 11 frames." in page.texts("p") and "No pictures: the file could not be read." in page.texts("p")
    assert f"8 pictures, {round(sum(map(len, files)) / 1024)} KiB of JPEG" in page.texts("p")[-1]


def test_a_thumbnail_looks_like_the_frame():
    x, y = torch.arange(320).expand(240, 320), torch.arange(240)[:, None].expand(240, 320)
    frame = torch.stack([x * 255 / 319, y, (x + y) % 2 * 120]).to(torch.uint8)
    small = decoded(base64.b64decode(thumbnail(frame)["uri"].split(",")[1]))
    slow = frame.float().reshape(3, 120, 2, 160, 2).mean((2, 4))
    assert small.shape == slow.shape and (small - slow).abs().max() < 10


def test_the_curve_is_drawn_over_the_scores_or_its_absence_explained(tmp_path, rows):
    seen = []

    def fit(scores, targets):
        seen.append((scores.tolist(), targets.tolist()))
        return lambda x: 6 - x, None

    folder = write_evaluation(tmp_path, {"KoNViD": rows})
    (curve,) = [path["d"] for path in report(folder, fit=fit).of("path") if path.get("class") == "line stroke-1"][:1]
    pairs = numbers(rows)
    assert [list(zip(*columns)) for columns in seen] == [pairs]
    axes = Axes((1, 5), (1, 5))
    low, high = min(score for score, _ in pairs), max(score for score, _ in pairs)
    points = [tuple(map(float, point.split())) for point in curve[1:].split("L")]
    assert points[0] == (axes.px(low), axes.py(6 - low)) and points[-1] == (axes.px(high), axes.py(6 - high))
    assert "No logistic was fitted: for no reason." in " ".join(report(folder).texts("figcaption"))


def test_scores_and_mos_beyond_1_to_5_are_in_the_charts(tmp_path):
    rows = [row("low.mp4", 0.2, 1.5), row("high.mp4", 5.0, 5.0), row("middle.mp4", 3.0, 3.0)]
    shown = tables(report(write_evaluation(tmp_path, {"released": rows})))
    assert [line[:2] for line in shown["Residuals in numbers"][1:]] == [
        ["0.00 to 0.50", "1"], ["3.00 to 3.50", "1"], ["4.50 to 5.00", "1"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("metrics.json", None, "metrics.json"),
        ("metrics.json", "{", "metrics.json"),
        ("metrics.json", "[]", "metrics.json: not a JSON object"),
        ("metrics.json", "{}", "metrics.json: names no datasets"),
        ("one/predictions.csv", None, "predictions.csv"),
        ("one/predictions.csv", "path,target,score\na,3,x\n", "predictions.csv:2: could not convert"),
        ("one/predictions.csv", "path,target,score\na,3,2\nb,3,nan\n", "predictions.csv:3: nan is not a finite"),
        ("one/predictions.csv", "path,score\na,3\n", "predictions.csv:2: a row needs a path and a target"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_named(tmp_path, file, text, named):
    folder = write_evaluation(tmp_path, {"one": some_rows(3)})
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(named)):
        write_report(folder, folder / "report.html", no_frames, no_fit)
    assert not (folder / "report.html").exists()


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_a_browser_has_nothing_to_complain_of(tmp_path, rows):
    hostile = [line | {"reasoning": f"<script>alert(1)</script>{HOSTILE}"} for line in rows]
    folder = write_evaluation(tmp_path, {"one": hostile})
    report(folder, lambda dataset, path: torch.zeros(2, 3, 9, 16, dtype=torch.uint8))
    lines, picture = console(folder / "pages" / "report.html", tmp_path)
    assert lines == [] and picture.startswith(b"\x89PNG")
    page = (folder / "pages" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "worse.html").write_text(page.replace("</body>", "<script>alert(1)</script></body>"), encoding="utf-8")
    lines, _ = console(tmp_path / "worse.html", tmp_path)
    assert len(lines) == 1 and "Content Security Policy" in lines[0], "a script would be seen, and refused"


# ---- where data lie in a drawing


def test_ticks_are_round_even_and_inside():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.choice([0.0, rng.uniform(-1e3, 1e3), rng.uniform(-1, 1)])
        high = low + 10 ** rng.uniform(-4, 5)
        found, step = ticks(low, high), tick_step(low, high)
        assert float(f"{step:.0e}"[0]) in (1, 2, 5) and 2 <= len(found) <= 6
        assert (
            low - 1e-6 * step <= found[0] < low + step * 1.001 and high - step * 1.001 < found[-1] <= high + 1e-6 * step
        )
        assert np.allclose(np.diff(found), step)
        first, last = whole_ticks([low, high])
        assert first <= low + 1e-6 * step and last >= high - 1e-6 * step and last - first < high - low + 2 * step
    assert ticks(1, 5) == [1, 2, 3, 4, 5] and whole_ticks([0.5, 0.5]) == (0, 1)


def test_axes_put_corners_where_they_belong():
    axes = Axes((10, 20), (-1, 1))
    assert (axes.px(10), axes.px(20), axes.py(-1), axes.py(1)) == (
        charts.LEFT, charts.RIGHT, charts.BOTTOM, charts.TOP
    )  # fmt: skip
    assert axes.line([(10, -1), (15, 0)]) == f"M{charts.LEFT} {charts.BOTTOM}L205 109"


def test_doctests():
    result = doctest.testmod(charts)
    assert result.attempted > 0 and result.failed == 0
