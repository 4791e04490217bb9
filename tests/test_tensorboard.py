"""--tensorboard: what TensorBoard's own reader finds in the event files; those tests need the package."""

import json
import shlex
import shutil

import pytest

import train
from data import synthetic
from grpo import distributed, tensorboard
from grpo.config import Config, parse_config
from grpo.tensorboard import Events
from tests.runs import line, validation

SMALL = shlex.split("--videos-per-step 4 --group-size 2 --max-new-tokens 48 --workers 0 --eval-every 2 --save-every 1")
WANTED = Config(tensorboard=True)


@pytest.fixture
def package():
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'vqathinker[tensorboard]'")


def read(folder):
    """(step, value) of every number by its tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def flat(row, above=""):
    """The numbers of a line of metrics.jsonl by their path."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield above + name, value


def slow(rows):
    found = {}
    for row in rows:
        for name, value in flat(row):
            found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
        share = sum(row["unparsed"].values()) * row["length"] / row["tokens"]
        found.setdefault("unparsed/share", []).append((row["step"], pytest.approx(share, rel=1e-5)))
    return found


def test_a_run_and_the_one_that_goes_on_with_it(package, tmp_path, monkeypatch):
    """The second is to write again what the first wrote behind the checkpoint that both share."""
    flush, flushed = Events.flush, []
    monkeypatch.setattr(Events, "flush", lambda events: flushed.append(flush(events)))
    labels = synthetic.write_clips(tmp_path / "clips", {"train": 9, "val": 4, "test": 3}, seed=11)
    output = tmp_path / "run"
    flags = [*SMALL, "--labels", str(labels), "--videos", str(tmp_path / "clips"), "--output", str(output)]
    assert train.main(parse_config([*flags, "--steps", "2", "--tensorboard", "--schedule", "constant"])) == 0
    rows = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    assert read(output / "tensorboard") == slow(rows) and {"kl", "val/srcc"} <= slow(rows).keys()
    assert len(flushed) == 2, "before each checkpoint"
    shutil.rmtree(output / "checkpoints" / "step_000002")
    more = ["--steps", "3", "--schedule", "constant", "--resume", "auto", "--allow-changed", "steps"]
    assert train.main(parse_config([*flags, *more, "--tensorboard"])) == 0
    rows = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and read(output / "tensorboard") == slow(rows)


def test_what_a_killed_run_wrote_behind_its_checkpoint_is_forgotten(package, tmp_path):
    before, after = [line(k) for k in range(1, 301)], [line(k, lr=7.0) for k in range(4, 8)]
    first = Events(tmp_path / "events", 0, WANTED)
    first.write(before)
    first.flush()  # and nothing closes it
    assert read(tmp_path / "events") == slow(before)
    with Events(tmp_path / "events", 3, WANTED) as second:
        second.write(after)
    assert read(tmp_path / "events") == slow([*before[:3], *after])


def test_undefined_numbers_and_the_kl_without_a_reference_are_left_out(package, tmp_path):
    undefined = validation(None, None, undefined={"srcc": "equal", "plcc": "equal"})
    with Events(tmp_path, 0, Config(tensorboard=True, beta=0.0)) as events:
        events.write([line(1, score_std=None, val=undefined), line(2)])
    found = read(tmp_path)
    assert not {"kl", "val/srcc", "val/undefined/srcc"} & found.keys()
    assert len(found["score_std"]) == 1 and len(found["val/scored"]) == 1 and len(found["lr"]) == 2


def test_without_the_flag_and_by_other_processes_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with Events(tmp_path / "a", 0, Config()) as events:
        events.write([line(1)])
        events.flush()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with Events(tmp_path / "b", 0, WANTED) as events:
        events.write([line(1)])
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_flag_is_refused_before_anything_slow(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "load", None)
    assert train.main(parse_config(["--tensorboard", "--output", str(tmp_path / "run")])) == 2
    said = "train.py: error: --tensorboard: needs tensorboard: pip install 'vqathinker[tensorboard]'\n"
    assert capsys.readouterr().err == said and not (tmp_path / "run").exists()
