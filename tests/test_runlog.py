import json
import time

import pytest

from grpo.runlog import JsonLines, Phases


def rows(*steps):
    return [{"step": step, "text": f"größer {step}"} for step in steps]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "text": "of another run"}\n', encoding="utf-8")
    JsonLines(path, done=0).write(rows(1, 1, 2))
    assert read(path) == rows(1, 1, 2)


def test_lines_are_on_disk_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, done=0)
    log.write(rows(1))
    assert read(path) == rows(1)
    log.write(rows(2))
    assert read(path) == rows(1, 2)


def test_a_continued_run_keeps_the_steps_that_are_done_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows(1, 1, 2, 2, 3, 3))
    path.write_text(whole + '{"step": 2, "te', encoding="utf-8")
    JsonLines(path, done=2).write(rows(3))
    assert read(path) == rows(1, 1, 2, 2, 3)


def test_a_continued_run_without_a_file_starts_one(tmp_path):
    JsonLines(tmp_path / "log.jsonl", done=5).write(rows(6))
    assert read(tmp_path / "log.jsonl") == rows(6)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n", "\n"])
def test_text_of_a_model_may_hold_any_line_separator(tmp_path, separator):
    path, row = tmp_path / "log.jsonl", {"step": 1, "text": f"one{separator}two"}
    JsonLines(path, done=0).write([row])
    JsonLines(path, done=1).write(rows(2))
    assert read(path) == [row, *rows(2)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    JsonLines(tmp_path / "log.jsonl", done=0).write(rows(1))
    assert not (tmp_path / "log.jsonl").exists()


def test_phases_add_up_until_they_are_taken(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 25.0, 30.0, 37.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = Phases()
    for name in ("forward", "backward", "forward"):
        with phases(name):
            pass
    assert phases.take() == {"forward": 6.0, "backward": 3.0}
    with phases("forward"):
        pass
    assert phases.take() == {"forward": 7.0} and phases.take() == {}


def test_a_phase_waits_for_the_device_and_counts_even_if_it_fails():
    phases = Phases(synchronize=lambda: time.sleep(0.02))
    with phases("forward"):
        pass
    assert phases.take()["forward"] >= 0.02
    with pytest.raises(KeyError), phases("data"):
        raise KeyError
    assert set(phases.take()) == {"data"}
