"""Ablations: which runs are made, that none is made twice or lost, and what their table and drawing say."""

import argparse
import doctest
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from scipy.stats import ttest_rel

import rewards.answers
from grpo import ablate, differences
from grpo.ablate import BASELINE, ROWS, Row, rows_of
from grpo.config import parse_config
from grpo.differences import difference
from grpo.tables import Table, as_markdown
from models.sampling import inverse_cdf
from rewards import Answers, parse_answer
from tests import runs as made
from tests.benchmarks import released_faults

SVG = "{http://www.w3.org/2000/svg}"


def write_run(out, row, seed, srcc=0.5, rmse=1.5, unparsed=0):
    """A finished run of 128 answers a step, of which at first none could be read."""
    counts = [128] * 5 + [unparsed] * differences.LAST_STEPS
    rows = [made.line(k, tokens=128 * 30, unparsed={"empty": n, "no_answer": 0}) for k, n in enumerate(counts, 1)]
    summary = {"before": {"srcc": 0.125}, "after": {"srcc": srcc, "plcc": 0.25, "rmse": rmse}}
    return made.write_run(ablate.folder(out, row, seed), rows, summary=summary, seed=seed)


@pytest.fixture
def started(monkeypatch):
    """The commands of runs, which end at once; those with --kl fail."""
    commands = []

    def finish(command, env, stdout, stderr):
        commands.append(command)
        assert env["OMP_NUM_THREADS"]
        if "--kl" in command:
            stdout.write("out of memory\n")
            return SimpleNamespace(returncode=1)
        given = parse_config(command[command.index("train") + 1 :])
        run = ablate.Path(given.output)
        run.mkdir(parents=True, exist_ok=True)
        given.save(run / "config.json")
        (run / "summary.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(run=finish, STDOUT=subprocess.STDOUT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return commands


# ---- rows


def test_every_row_changes_the_demo_and_no_two_are_the_same():
    rows = rows_of(ROWS, ablate.DEMO.split())
    assert len(rows) == 1 + sum(map(len, ROWS.values())) == len({parse_config([*row.flags]) for row in rows})
    rewards = {name: parse_config(flags.split()).rewards for name, flags in ROWS["rewards"].items()}
    for name in ("regression", "ranking", "temporal", "format"):
        every = {"regression", "ranking", "temporal", "format"}
        assert set(rewards[f"without {name}"].split(",")) == every - {name}
        assert [term for term in rewards[f"{name} alone"].split(",") if not term.endswith("=0")] == [name]


def test_a_row_that_is_the_baseline_is_left_out():
    names = [row.name for row in rows_of(["group", "beta"], ["--group-size", "4", "--beta", "0"])]
    assert names == [BASELINE, "G 16", "beta 0.2"]


# ---- training


def test_each_run_is_made_once_seed_by_seed(tmp_path, started):
    rows = rows_of(["beta"], ["--steps", "7"])
    assert ablate.train_all(tmp_path, rows, [3, 4]) == []
    outputs = [command[command.index("--output") + 1] for command in started]
    assert [output.rpartition("/")[2] for output in outputs] == [
        *("baseline-3", "beta-0-3", "beta-0.2-3"),
        *("baseline-4", "beta-0-4", "beta-0.2-4"),
    ]
    assert all(command[:3] == [sys.executable, "-m", "train"] for command in started)
    assert all(command[-2:] == ["--resume", "auto"] and "7" in command for command in started)
    assert ablate.train_all(tmp_path, rows, [3, 4, 5]) == [] and len(started) == 9


def test_several_processes_start_by_torchrun(tmp_path, started):
    ablate.train(tmp_path, Row("", BASELINE, ()), 0, processes=8)
    assert started[0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert started[0][6:8] == ["-m", "train"]


def test_a_run_that_fails_keeps_no_other(tmp_path, started):
    rows = [Row("", BASELINE, ()), Row("", "bad", ("--kl", "k1")), Row("", "good", ("--beta", "0"))]
    (failed,) = ablate.train_all(tmp_path, rows, [0])
    assert len(started) == 3 and failed == f"bad, seed 0: see {tmp_path / 'bad-0.log'}"
    assert (tmp_path / "bad-0.log").read_text() == "out of memory\n"
    assert ablate.finished(tmp_path, "good", 0) and not ablate.finished(tmp_path, "bad", 0)


def test_runs_with_other_settings_are_refused_before_any_is_made(tmp_path, started):
    ablate.train_all(tmp_path, [Row("", BASELINE, ("--steps", "7"))], [0])
    with pytest.raises(ValueError, match=r"baseline-0: .*--steps was 7, is 8"):
        ablate.train_all(tmp_path, [Row("", "new", ()), Row("", BASELINE, ("--steps", "8"))], [0, 1])
    assert len(started) == 1


@pytest.mark.parametrize("flags", ["--jobs 0", "--processes 0", "--seeds 1 0 1"])
def test_numbers_that_make_no_sense_are_refused_before_any_run_is_made(flags, tmp_path, started, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate", "--out", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit) as exit_:
        ablate.main()
    assert exit_.value.code == 2 and f"{flags}: " in capsys.readouterr().err and not started


@pytest.mark.parametrize("flag", ["--seed=3", "--output", "--resume"])
def test_flags_that_are_set_for_every_run_are_refused(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate", "--out", str(tmp_path), flag, "3"])
    with pytest.raises(SystemExit) as exit_:
        ablate.main()
    assert exit_.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_has_no_table(tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, seeds=[0], table=True)
    assert ablate.run(rows_of([], []), args) == 0
    assert capsys.readouterr().err == f"{tmp_path}: no run is finished\n" and not list(tmp_path.iterdir())


# ---- differences


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_that_of_scipy(n):
    draw = random.Random(n)
    one, two = ({seed: draw.random() for seed in range(n)} for _ in range(2))
    found = difference(one, two)
    test = ttest_rel([*one.values()], [*two.values()])
    interval = test.confidence_interval(0.95)
    assert found.seeds == n
    expected = [*interval, test.pvalue, statistics.mean(one.values()) - statistics.mean(two.values())]
    assert [*found.interval, found.p_value, found.mean] == pytest.approx(expected, abs=1e-9)


def test_seeds_are_paired_by_number_and_what_is_undefined_is_left_out():
    first, second = {2: 0.5, 0: 0.7, 1: None, 9: 0.1}, {0: 0.6, 1: 0.3, 2: 0.3}
    assert difference(first, second)[:2] == (2, pytest.approx(0.15))
    assert difference({1: None}, {1: 0.3}) == (0, None, None, None, "undefined for 1")
    assert difference({1: 0.5}, {1: 0.25}) == (1, 0.25, None, None, "one seed")
    assert difference({0: 0.1, 1: 0.2}, {0: None, 2: 0.1}) == (0, None, None, None, "no baseline")


def test_verdicts():
    same = difference({0: 0.1, 1: 0.2}, {0: 0.1, 1: 0.2})
    assert same.p_value == 1 and same.verdict == "no difference"
    baseline = {0: 0.2, 1: 0.3, 2: 0.2, 3: 0.1}
    noisy = {0: 0.1, 1: 0.4, 2: 0.2}
    assert difference(noisy, baseline).verdict == "within noise"
    assert difference({**noisy, 3: None}, baseline)[:4] == difference(noisy, baseline)[:4]
    assert difference({**noisy, 3: None}, baseline).verdict == "undefined for 1"
    worse = difference({0: 0.1, 1: 0.11, 2: 0.12}, {0: 0.5, 1: 0.52, 2: 0.51})
    assert worse.interval[1] < 0 and worse.verdict == "differs"
    better = difference({0: 0.5, 1: 0.52, 2: 0.51}, {0: 0.1, 1: 0.11, 2: 0.12})
    assert better.interval[0] > 0 and better.verdict == "differs"


# ---- table and drawing


@pytest.fixture
def runs(tmp_path):
    """SRCC and RMSE by row and seed: a run without an SRCC, and a row with a single seed."""
    values = {
        BASELINE: {0: (0.8, 0.5), 1: (0.82, 0.52), 2: (0.79, 0.51)},
        "without regression": {0: (0.31, 1.04), 1: (None, 1.03), 2: (0.29, 1.02)},
        "sigma 1": {0: (0.81, 0.6), 1: (0.8, 0.45), 2: (0.8, 0.5)},
        "beta 0": {0: (0.5, 0.75)},
    }
    for name, seeds in values.items():
        for seed, (srcc, rmse) in seeds.items():
            write_run(tmp_path, name, seed, srcc, rmse, unparsed=16 * seed)
    return values


def known(seeds, metric):
    return [values[metric] for values in seeds.values() if values[metric] is not None]


def test_the_table_is_what_the_runs_say(tmp_path, runs, capsys):
    ablate.write(tmp_path, rows_of(ROWS, []), [0, 1, 2], "found")
    header, _, *lines = [line for line in (tmp_path / "found.md").read_text().splitlines() if line.startswith("|")]
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines}
    assert list(cells) == list(runs) and len(header.strip("| ").split(" | ")) == 8
    for name, seeds in runs.items():
        _, number, srcc, plcc, rmse, readable, *against = cells[name]
        assert number == str(len(seeds))
        for metric, cell in enumerate((srcc, rmse)):
            values = known(seeds, metric)
            assert cell.startswith(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            assert (", 1 undefined" in cell) == (len(values) < len(seeds))
        assert plcc.startswith("0.250")
        assert float(readable) == pytest.approx(1 - statistics.mean(16 * seed / 128 for seed in seeds), abs=5e-4)
        for metric, cell in enumerate(against):
            pairs = [(seeds[k][metric], runs[BASELINE][k][metric]) for k in seeds if seeds[k][metric] is not None]
            if name == BASELINE:
                assert cell == "–"
            elif len(pairs) > 1:
                test = ttest_rel(*zip(*pairs))
                mean = sum(a - b for a, b in pairs) / len(pairs)
                low, high = test.confidence_interval(0.95)
                assert cell.startswith(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], p {test.pvalue:.3f}: ")
            else:
                assert cell.startswith(("-0.300: ", "+0.250: ")[metric])
    verdicts = {name: [cell.rpartition(": ")[2] for cell in cells[name][-2:]] for name in runs if name != BASELINE}
    assert verdicts == {
        "without regression": ["undefined for 1", "differs"],
        "sigma 1": ["within noise", "within noise"],
        "beta 0": ["one seed", "one seed"],
    }
    text = capsys.readouterr().out
    assert "SRCC before training: 0.125 (0.125 to 0.125)" in text and "Undefined:" in text


def test_the_drawing_has_a_dot_for_every_run_where_it_belongs(tmp_path, runs):
    ablate.write(tmp_path, rows_of(ROWS, []), [0, 1, 2], "found")
    text = (tmp_path / "found.svg").read_text()
    panels = [group for group in ElementTree.fromstring(text).find(f"{SVG}g") if group.tag == f"{SVG}g"]
    assert len(panels) == 2
    for metric, panel in enumerate(panels):
        ticks = {float(tick.text): float(tick.get("x")) for tick in panel if tick.get("class") == "tick"}
        (low, left), *_, (high, right) = sorted(ticks.items())

        def place(value, low=low, left=left, high=high, right=right):
            return pytest.approx(left + (value - low) / (high - low) * (right - left), abs=0.11)

        lines = [line for line in panel if line.tag == f"{SVG}g"]
        assert len(lines) == len(runs)
        heights = []
        for line, seeds in zip(lines, runs.values()):
            dots = line.findall(f"{SVG}circle")
            values = known(seeds, metric)
            assert [float(dot.get("cx")) for dot in dots] == [place(value) for value in values]
            assert low <= min(values) and max(values) <= high
            heights += {float(dot.get("cy")) for dot in dots}
            (mean,) = line.findall(f"{SVG}path")
            assert float(re.match(r"M([0-9.]+)", mean.get("d"))[1]) == place(statistics.mean(values))
        assert heights == sorted(set(heights)) and len(heights) == len(runs)
        assert [line.get("class") for line in lines] == [None, [None, "differs"][metric], None, None]
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and "<script" not in text


def test_without_a_baseline_nothing_is_compared(tmp_path):
    write_run(tmp_path, "beta 0", 0)
    table = differences.table(ablate.results(tmp_path, rows_of(ROWS, []), [0]))
    assert table.rows[0][-2:] == ["–"] * 2


def test_a_run_that_measured_nothing_is_named(tmp_path):
    run = write_run(tmp_path, BASELINE, 0)
    (run / "summary.json").write_text(json.dumps({"before": None, "after": None}))
    with pytest.raises(ValueError, match=r"baseline-0: .*no split 'test'"):
        ablate.results(tmp_path, rows_of([], []), [0])


def test_markdown_keeps_its_columns():
    text = as_markdown(Table("title", ["a", "b"], [["x|y", "z"]], ["first", "second"]))
    assert text == "| a | b |\n| --- | --- |\n| x\\|y | z |\n\nfirst\n\nsecond"


# ---- the released code's faults


def test_an_unreadable_answer_gets_a_random_score_and_a_readable_one_its_own(monkeypatch):
    texts = [["<answer>3.21</answer>", "3.21", "<answer>45</answer>", "<answer>2</answer>"]] * 50
    fair = Answers.from_texts(texts, torch.full((50,), 3.0))
    monkeypatch.setattr(rewards.answers, "parse_answer", released_faults.with_random_score)
    found = Answers.from_texts(texts, torch.full((50,), 3.0))
    assert torch.equal(found.scores[fair.valid], fair.scores[fair.valid]) and found.valid.all()
    made = found.scores[~fair.valid]
    assert len(set(made.tolist())) > 50 and made.min() >= 1 and made.max() <= 5 and 2.5 < made.mean() < 3.5
    assert found.failures() == fair.failures() and fair.failures()["out_of_range"] == 50
    assert parse_answer("3.21").score is None


def test_top_k_draws_only_the_likeliest_by_their_probabilities():
    logprobs = torch.randn(80, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    best = logprobs.argsort(descending=True)[: released_faults.TOP_K].tolist()
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    drawn = released_faults.top_k(logprobs.expand(20_000, -1), uniforms)
    kept = sum(math.exp(logprobs[k]) for k in best)
    for k in range(80):
        share = (drawn == k).float().mean().item()
        assert share == pytest.approx(math.exp(logprobs[k]) / kept if k in best else 0, abs=2e-4)
    assert not torch.equal(drawn, inverse_cdf(logprobs.expand(20_000, -1), uniforms))


@pytest.mark.parametrize("fault", released_faults.FAULTS)
def test_a_row_trains_with_its_fault_and_no_other(fault, monkeypatch):
    baseline, row = released_faults.rows("--steps 7", {"its name": fault})
    assert (baseline.name, baseline.module) == (BASELINE, ("train",))
    assert (row.name, row.flags, row.module[0]) == ("its name", baseline.flags, released_faults.__name__)
    for module, name, _ in released_faults.FAULTS.values():
        monkeypatch.setattr(module, name, getattr(module, name))  # put back in the end
    trained = []

    def main(config):
        for key, (module, name, faulty) in released_faults.FAULTS.items():
            if getattr(module, name) is faulty:
                trained.append((key, config.steps))
        return 3

    monkeypatch.setattr(released_faults.train, "main", main)
    monkeypatch.setattr(sys, "argv", ["released_faults", *row.module[1:], *row.flags])
    assert released_faults.main() == 3 and trained == [(fault, 7)]


def test_cut_answers_have_a_baseline_of_their_own(tmp_path, monkeypatch):
    asked = []

    def run(rows, args, name):
        asked.append((args.out, [row.name for row in rows], {row.flags for row in rows}))
        return len(asked) % 2

    monkeypatch.setattr(released_faults, "run", run)
    monkeypatch.setattr(sys, "argv", ["released_faults", "--out", str(tmp_path)])
    assert released_faults.main() == 1
    demo = tuple(ablate.DEMO.split())
    assert asked == [
        (tmp_path, [BASELINE, "top-k 50", "random score"], {demo}),
        (tmp_path / "cut", [BASELINE, "random score"], {(*demo, "--max-new-tokens", "31")}),
    ]


def test_doctest():
    found = doctest.testmod(differences)
    assert found.attempted and not found.failed


def test_the_page_lists_the_rows():
    page = (Path(__file__).parents[1] / "docs" / "ablation.md").read_text(encoding="utf-8")
    groups = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert list(groups) == list(ROWS)
    for group, words in groups.items():
        assert len(ROWS[group]) == (8 if group == "rewards" else len(words.split(", ")))
        assert all(name.split()[-1] in words for name in ROWS[group] if group != "rewards")
    assert ablate.DEMO in page
