"""Runs that are stopped, lose a process, or meet numbers that are not finite; `tests/faults.py` makes it so."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo.update
import train
from data import synthetic
from grpo.config import parse_config
from tests.benchmarks.soak import soak

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
FLAGS = "--steps 4 --videos-per-step 4 --group-size 2 --max-new-tokens 24 --eval-every 0 --save-every 1 --workers 0"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a short run, but for its folder."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    labels = synthetic.write_clips(folder, {"train": 9, "val": 1, "test": 1}, seed=11)
    rewards = "regression,format,tests.faults:Fault=0"
    return [*shlex.split(FLAGS), "--labels", str(labels), "--videos", str(folder), "--rewards", rewards]


def start(*command, fault="0 0 nothing", **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault, **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process):
    """Exit status and stderr."""
    try:
        return process.communicate(timeout=120)[1], process.returncode
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun has children to see to
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()


def run(flags, output, *more):
    """The exit status of a run in this process."""
    try:
        return train.main(parse_config([*flags, "--output", str(output), *more]))
    finally:
        grpo.update.grpo_loss = LOSS


LOSS = grpo.update.grpo_loss


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_saved(run):
    return [path.name for path in sorted((run / "checkpoints").iterdir())]


def assert_equal_ends(run, other):
    """The same last weights, and the same answers on the way."""
    ends = [load_file(path / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors") for path in (run, other)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert lines(run / "rollouts.jsonl") == lines(other / "rollouts.jsonl")


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run(flags, output) == 0
    return output


@pytest.fixture(scope="module")
def undisturbed_pair(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "pair"
    said, status = finish(start(*TORCHRUN, "train.py", *flags, "--output", str(output)))
    assert status == 0, said
    return output


# ---- signals


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_from_there(
    flags, undisturbed, tmp_path, monkeypatch, capsys, name, status
):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setenv("FAULT", f"2 0 {name}")
    output = tmp_path / "run"
    assert run(flags, output, "--save-every", "0") == status
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert told == f"train.py: stopped by {name}, all steps saved; go on with --output {output} --resume auto"
    assert steps_saved(output) == ["step_000002"] and [row["step"] for row in lines(output / "metrics.jsonl")] == [1, 2]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    monkeypatch.delenv("FAULT")
    assert run(flags, output, "--resume", "auto") == 0
    assert_equal_ends(output, undisturbed)


def test_a_signal_in_the_last_step_is_heard_too(flags, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", f"{STEPS} 0 SIGTERM")
    assert run(flags, tmp_path / "run") == 143
    assert_equal_ends(tmp_path / "run", undisturbed)


def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(flags, undisturbed_pair, tmp_path):
    output = tmp_path / "run"
    command = [*TORCHRUN, "train.py", *flags, "--output", str(output)]
    said, status = finish(start(*command, fault="2 1 SIGTERM"))
    assert status != 0 and said.count("train.py: stopped by SIGTERM") == 1 and "LostProcess" not in said
    assert steps_saved(output) == ["step_000001", "step_000002"]
    said, status = finish(start(*command, "--resume", "auto"))
    assert status == 0, said
    assert_equal_ends(output, undisturbed_pair)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_ends_it_quietly(flags, tmp_path, number):
    output = tmp_path / "run"
    many = ["--steps", "1000", "--workers", "1", "--output", str(output)]
    process = start(sys.executable, "train.py", *flags, *many)
    deadline = time.monotonic() + 60
    while not lines(output / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    said, status = finish(process)
    assert status == 128 + number and "Traceback" not in said and "DataLoader" not in said, said
    done = lines(output / "metrics.jsonl")[-1]["step"]
    assert steps_saved(output)[-1] == f"step_{done:06d}"


def test_a_second_ctrl_c_ends_the_process_at_once(flags, tmp_path):
    output = tmp_path / "run"
    process = start(sys.executable, "train.py", *flags, "--output", str(output), fault="2 0 hang")
    deadline = time.monotonic() + 60
    while not lines(output / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # it hangs by now
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    finish(process)


# ---- what is not finite


def test_too_many_bad_steps_end_the_run_and_it_goes_on_from_before_them(
    flags, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAULT", "2 0 nan")
    output = tmp_path / "run"
    assert run(flags, output, "--max-bad-steps", "2", "--save-every", "3") == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    dump = output / "bad_step_000003.json"
    assert told.startswith("train.py: error: 2 steps in a row, the last of them 3, ") and str(dump) in told
    assert [row["skipped"] for row in lines(output / "metrics.jsonl")] == [0, 1, 1]
    assert steps_saved(output) == ["step_000001"]

    written = json.loads(dump.read_text(), parse_constant=pytest.fail)
    rollouts = [row for row in lines(output / "rollouts.jsonl") if row["step"] == 3]
    assert written["step"] == 3 and len(written["answers"]) == len(rollouts) == 8
    for row, rollout in zip(written["answers"], rollouts):
        assert rollout.items() <= row.items()
        sizes = {len(row[name]) for name in ("tokens", "logprobs", "sampled", "reference")}
        assert len(sizes) == 1 and min(sizes) > 0 and max(row["logprobs"]) <= 0
        assert row["logprobs"] == pytest.approx(row["sampled"], abs=1e-3)

    monkeypatch.delenv("FAULT")
    assert run(flags, output, "--resume", "auto") == 0
    assert_equal_ends(output, undisturbed)
    assert json.loads((output / "summary.json").read_text())["health"]["skipped"]["steps"] == 0


def test_fewer_bad_steps_are_counted_and_told_once(flags, tmp_path, monkeypatch, capsys):
    update, steps = train.update, []

    def infinite(*args, **kwargs):
        loss, terms = LOSS(*args, **kwargs)
        return loss * (torch.inf if len(steps) in (2, 3) else 1), terms

    monkeypatch.setattr(train, "update", lambda *args: steps.append(None) or update(*args))
    monkeypatch.setattr(grpo.update, "grpo_loss", infinite)
    output = tmp_path / "run"
    assert run(flags, output, "--max-bad-steps", "3") == 0
    assert [row["skipped"] for row in lines(output / "metrics.jsonl")] == [0, 1, 1, 0]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: step" in line]
    assert len(warnings) == 1 and "step 2: 1 updates left out" in warnings[0]
    assert run(flags, output, "--max-bad-steps", "3", "--resume", "auto") == 0  # nothing is left to do
    found = json.loads((output / "summary.json").read_text())["health"]
    assert found["skipped"] == {"steps": 2, "first": 2, "number": 1}
    assert not any(found[name]["steps"] for name in found if name != "skipped")
    assert "warning: step" not in capsys.readouterr().err


def test_a_loss_that_breaks_in_one_of_two_processes_ends_both(flags, tmp_path):
    output = tmp_path / "run"
    command = [*TORCHRUN, "train.py", *flags, "--output", str(output), "--max-bad-steps", "2"]
    said, status = finish(start(*command, fault="2 1 nan"))
    assert status != 0 and said.count("train.py: error: 2 steps in a row") == 1
    assert steps_saved(output) == ["step_000001"]
    answers = json.loads((output / "bad_step_000003.json").read_text())["answers"]
    rollouts = [row for row in lines(output / "rollouts.jsonl") if row["step"] == 3]
    assert [(row["video"], row["text"]) for row in answers] == [(row["video"], row["text"]) for row in rollouts]


# ---- processes that are lost


def test_torchrun_begins_anew_where_a_killed_process_left_off(flags, undisturbed_pair, tmp_path):
    output = tmp_path / "run"
    command = [*TORCHRUN, "--max-restarts", "1", "train.py", *flags, "--output", str(output)]
    said, status = finish(start(*command, fault="3 1 SIGKILL"))
    assert status == 0, said
    assert "\nerror: process 0 lost touch with the others: ended: process 1 (" in said
    assert_equal_ends(output, undisturbed_pair)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_left_alone(flags, tmp_path):
    """The short form of the soak in docs/results.md."""
    longer = [*flags, "--steps", "16", "--save-every", "2"]
    result = soak(tmp_path, longer, pause=(0, 0), most=3, seed=3, steps=3)
    assert result["differences"] == [] and result["steps"] == 16
    assert result["kills"] == {"one rank": 2, "all": 1}


def test_a_process_that_hangs_is_named_in_time(flags, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "train.py", *flags, "--output", str(tmp_path / "run"), "--dist-timeout", "8"]
    pair = [
        start(*command, fault="2 1 hang", RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
        for rank in "01"
    ]
    try:
        deadline = time.monotonic() + 60
        while not lines(tmp_path / "run" / "metrics.jsonl") and time.monotonic() < deadline:
            time.sleep(0.1)
        begun = time.monotonic()
        said, status = finish(pair[0])
        assert time.monotonic() - begun < 30
        assert status == 1
        assert "\nerror: process 0 lost touch with the others: no answer: process 1 (" in said, said
    finally:
        os.killpg(pair[1].pid, signal.SIGKILL)
        finish(pair[1])


def test_restarts_need_a_folder_to_find_again(flags, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert train.main(parse_config(flags)) == 2
    assert (
        capsys.readouterr().err
        == "train.py: error: --output: torchrun's --max-restarts needs it, to find the run again\n"
    )


@pytest.mark.parametrize(("resume", "steps"), [([], [1, 2, 3, 4]), (["--resume"], [4])])
def test_a_restart_before_the_first_save_begins_as_it_was_told_to(
    flags, undisturbed, tmp_path, monkeypatch, resume, steps
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.json").write_text("{}")  # all that the first start came to
    begin = [str(undisturbed / "checkpoints" / "step_000003")] if resume else []
    assert run(flags, output, *resume, *begin) == 0
    assert [row["step"] for row in lines(output / "metrics.jsonl")] == steps
