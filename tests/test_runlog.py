import json
import os
import shutil
import threading
import time
import tracemalloc

import pytest

from grpo.runlog import JsonLines, Phases


def rows(*steps):
    return [{"step": step, "text": f"größer {step}"} for step in steps]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path, rows, done=0):
    with JsonLines(path, done) as log:
        log.write(rows)


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "text": "of another run"}\n', encoding="utf-8")
    write(path, rows(1, 1, 2))
    assert read(path) == rows(1, 1, 2)


def test_lines_are_in_the_file_after_flush_in_the_order_of_the_writes(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, done=0)
    for step in range(300):
        log.write(rows(step))
    log.flush()
    assert read(path) == rows(*range(300))
    log.write(rows(300, 301))
    log.flush()
    assert read(path) == rows(*range(302))


def test_a_continued_run_keeps_the_steps_that_are_done_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows(1, 1, 2, 2, 3, 3))
    path.write_text(whole + '{"step": 2, "te', encoding="utf-8")
    write(path, rows(3), done=2)
    assert read(path) == rows(1, 1, 2, 2, 3)


def test_a_file_that_is_continued_is_not_held_in_memory(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": k, "text": "x" * 10_000}) + "\n" for k in range(400)))
    tracemalloc.start()
    JsonLines(path, done=300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["step"] for row in read(path)] == [*range(301)] and peak < 4e6 / 4


def test_rows_are_those_of_the_steps_that_are_done_and_of_every_write(tmp_path, monkeypatch):
    append = JsonLines._append
    monkeypatch.setattr(JsonLines, "_append", lambda *call: (time.sleep(0.05), append(*call)))
    path = tmp_path / "log.jsonl"
    write(path, rows(1, 2, 3))
    with JsonLines(path, done=2) as log:
        assert log.rows() == rows(1, 2)
        log.write(rows(3, 4))
        assert log.rows() == rows(1, 2, 3, 4)
    monkeypatch.setenv("RANK", "1")
    assert JsonLines(path, done=2).rows() == []


def test_a_continued_run_without_a_file_starts_one(tmp_path):
    write(tmp_path / "log.jsonl", rows(6), done=5)
    assert read(tmp_path / "log.jsonl") == rows(6)


def test_a_run_that_is_killed_as_it_is_continued_keeps_its_lines(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    write(path, rows(1, 2, 3))

    def killed(*_):
        assert read(path) == rows(1, 2, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, done=2)
    assert read(path) == rows(1, 2, 3)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n", "\n"])
def test_text_of_a_model_may_hold_any_line_separator(tmp_path, separator):
    path, row = tmp_path / "log.jsonl", {"step": 1, "text": f"one{separator}two"}
    write(path, [row])
    write(path, rows(2), done=1)
    assert read(path) == [row, *rows(2)]


def test_other_processes_write_nothing_and_start_no_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    threads = threading.active_count()
    with JsonLines(tmp_path / "log.jsonl", done=0) as log:
        log.write(rows(1))
        assert threading.active_count() == threads
    assert not (tmp_path / "log.jsonl").exists()


@pytest.fixture
def blocked(tmp_path):
    """A log whose file is a pipe: it cannot even be opened for writing until somebody reads."""
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, done=0)
    path.unlink()
    os.mkfifo(path)
    yield log
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # lets go who still waits


@pytest.mark.parametrize("end", [JsonLines.flush, JsonLines.__exit__])
def test_write_returns_while_the_file_is_blocked_and_the_end_waits(blocked, end):
    written, ended = threading.Event(), threading.Event()

    def use():
        blocked.write(rows(1))
        mutable = rows(2)
        blocked.write(mutable)
        mutable[0]["step"] = 3
        written.set()
        end(blocked)
        ended.set()

    threading.Thread(target=use, daemon=True).start()
    assert written.wait(10) and not ended.wait(0.2)
    with open(os.open(blocked.path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as pipe:
        assert ended.wait(10)
        assert [json.loads(line) for line in pipe] == rows(1, 2)


def test_the_lines_of_a_run_that_raised_are_complete(tmp_path, monkeypatch):
    append = JsonLines._append
    monkeypatch.setattr(JsonLines, "_append", lambda *call: (time.sleep(0.05), append(*call)))
    path = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt), JsonLines(path, done=0) as log:
        for step in (1, 2, 3):
            log.write(rows(step))
        raise KeyboardInterrupt
    assert read(path) == rows(1, 2, 3)


@pytest.mark.parametrize("call", [JsonLines.flush, JsonLines.__exit__, lambda log: log.write(rows(4))])
def test_a_failed_write_is_raised_once_by_the_next_call_and_nothing_follows_it(tmp_path, call):
    folder = tmp_path / "run"
    folder.mkdir()
    log = JsonLines(folder / "log.jsonl", done=0)
    shutil.rmtree(folder)
    log.write(rows(1))
    deadline = time.monotonic() + 10
    while not log.waiting[0].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
        call(log)
    folder.mkdir()
    if call is not JsonLines.__exit__:
        log.write(rows(5))
        log.flush()
    log.__exit__()
    assert not log.path.exists()


@pytest.mark.parametrize("value", [float("nan"), "\ud800"])
def test_what_json_cannot_hold_is_the_callers_error(tmp_path, value):
    with JsonLines(tmp_path / "log.jsonl", done=0) as log:
        with pytest.raises(ValueError, match=r"JSON compliant|surrogates"):
            log.write([{"step": 1}, {"step": 1, "value": value}])
        log.write(rows(2))
    assert read(tmp_path / "log.jsonl") == rows(2)


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
