"""The table of results: rows and means against sums written out, and how they are shown."""

import pytest

from rewards.results_table import as_markdown, as_text, results_table

BENCHMARKS = {
    "A": {"domain": "in", "published": {"One": {"srcc": 0.8, "plcc": 0.9}, "Two": {"srcc": 0.7, "plcc": 0.6}}},
    "B": {"domain": "ood", "published": {"One": {"srcc": 0.5, "plcc": 0.55}, "Two": {"srcc": 0.4, "plcc": 0.45}}},
    "C": {"domain": "ood", "published": {"One": {"srcc": 0.3, "plcc": 0.35}}},
    "not run": {"domain": "ood", "published": {"Three": {"srcc": 0.1, "plcc": 0.1}}},
}


def measured(scored, srcc, interval=None, fitted=0.5):
    found = {"scored": scored, "listed": scored + 10, "srcc": srcc, "plcc": 0.6, "krcc": 0.4}
    found |= {"plcc_fitted": fitted, "rmse_fitted": None if fitted is None else 0.7}
    return found | ({"intervals": {"srcc": interval}} if interval else {})


RESULTS = {
    "A": measured(100, 0.61, [0.58, 0.64]),
    "own": measured(7, 0.99),
    "B": measured(300, 0.5),
    "C": measured(100, 0.1, fitted=None),
}


def row(rows, name):
    (found,) = [row for row in rows if row["dataset"] == name]
    return found


def test_every_data_set_has_its_row_with_published_figures_beside():
    rows = results_table(RESULTS, BENCHMARKS)
    assert [row["dataset"] for row in rows] == ["A", "own", "B", "C", "in-domain mean", "OOD mean"]
    assert row(rows, "A")["srcc_interval"] == [0.58, 0.64] and row(rows, "B")["srcc_interval"] is None
    assert row(rows, "A")["published"] == BENCHMARKS["A"]["published"]
    assert row(rows, "C")["published"]["Two"] == {"srcc": None, "plcc": None}
    assert row(rows, "own")["domain"] is None and row(rows, "own")["published"]["One"]["srcc"] is None
    assert (row(rows, "C")["scored"], row(rows, "C")["listed"], row(rows, "C")["rmse_fitted"]) == (100, 110, None)


def test_means_are_weighted_by_scored_videos_and_taken_over_what_was_measured():
    rows = results_table(RESULTS, BENCHMARKS)
    ood = row(rows, "OOD mean")
    assert (ood["scored"], ood["listed"]) == (400, 420)
    assert ood["srcc"] == pytest.approx((300 * 0.5 + 100 * 0.1) / 400)
    assert ood["plcc_fitted"] == 0.5 and ood["rmse_fitted"] == 0.7  # of B alone
    assert ood["published"]["One"]["plcc"] == pytest.approx((300 * 0.55 + 100 * 0.35) / 400)
    assert ood["published"]["Two"] == {"srcc": pytest.approx(0.4), "plcc": pytest.approx(0.45)}  # of B alone
    assert ood["left_out"] == {name: ["C"] for name in ("plcc_fitted", "rmse_fitted", "Two srcc", "Two plcc")}
    assert row(rows, "in-domain mean")["srcc"] == 0.61 and row(rows, "in-domain mean")["left_out"] == {}
    assert [row["dataset"] for row in results_table({"own": RESULTS["own"]}, BENCHMARKS)] == ["own"]


def test_text_is_aligned_and_says_what_a_mean_leaves_out():
    head, *lines, note = as_text(results_table(RESULTS, BENCHMARKS)).splitlines()
    assert head.split("  ")[0] == "data set" and head.split()[-2:] == ["One", "Two"]
    first = "A 100/110 0.610 [0.580, 0.640] 0.600 0.500 0.400 0.700 0.800/0.900 0.700/0.600"
    assert " ".join(lines[0].split()) == first
    assert lines[1].split()[-2:] == ["-", "-"]
    mean = "OOD mean 400/420 0.400 0.600 0.500* 0.400 0.700* 0.450/0.500 0.400*/0.450*"
    assert " ".join(lines[-1].split()) == mean
    assert {len(line) for line in [head, *lines]} == {len(head)}
    assert note == "(*) OOD mean without C: plcc_fitted, rmse_fitted, Two srcc, Two plcc"


def test_markdown_has_as_many_cells_in_every_line():
    table, note = as_markdown(results_table(RESULTS | {"a|b": RESULTS["own"]}, BENCHMARKS)).split("\n\n")
    lines = table.splitlines()
    assert lines[0].startswith("| data set | scored | SRCC | PLCC | PLCC fitted | KRCC | RMSE fitted | One | Two |")
    assert {line.count("|") for line in lines} == {10} and len(lines) == 9
    assert "| 0.610 [0.580, 0.640] |" in lines[2] and note.startswith("(*) OOD mean without C")
    assert as_markdown(results_table({"A": RESULTS["A"]}, BENCHMARKS)).count("\n\n") == 0
