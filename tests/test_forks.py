"""What a command does in a fork is what it does in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests import forks

TELL = """
import json, os, sys, threading
import beside, elsewhere
MAIN = "the main module"
threading.Timer(0.1, print, ["from a thread"]).start()
print(json.dumps([sys.argv, __name__, os.getcwd(), sys.stdin.read(), dict(os.environ), sys.path]))
print("wrong", file=sys.stderr)
os.system("echo from a shell")
print(sys.modules["__main__"].MAIN, flush=True)
if sys.argv[1:] == ["raise"]:
    raise KeyError("raised")
if sys.argv[1:] == ["kill"]:
    os.kill(os.getpid(), 9)
sys.exit(sys.argv[1] if sys.argv[1] == "text" else int(sys.argv[1]))
"""


@pytest.fixture
def both(tmp_path):
    """A command's outcome in a process of its own and in a fork."""
    for name in ("work", "work/package", "linked", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked/script.py").write_text(TELL)
    (tmp_path / "work/package/module.py").write_text(TELL)
    (tmp_path / "work/script.py").symlink_to(tmp_path / "linked/script.py")
    for beside in ("work/beside.py", "linked/beside.py", "other/elsewhere.py"):
        (tmp_path / beside).write_text("print(__file__)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "other"), "WORD": "of the command", "OMP_NUM_THREADS": "1"}
    env.pop("HOME", None)

    def outcomes(*words):
        command = [sys.executable, *words]
        new = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True)
        return new, forks.run(command, tmp_path / "work", env)

    return outcomes


@pytest.mark.parametrize("ending", ["0", "3", "text", "raise", "kill"])
@pytest.mark.parametrize("program", [["script.py"], ["-m", "package.module"]], ids=["script", "module"])
def test_a_fork_does_what_a_new_process_does(both, program, ending):
    new, fork = both(*program, ending)
    assert (fork.returncode, fork.stdout) == (new.returncode, new.stdout)
    assert new.returncode == {"0": 0, "3": 3, "text": 1, "raise": 1, "kill": -9}[ending]
    assert "the main module" in new.stdout and ("thread" in new.stdout) == (ending != "kill")
    assert fork.stderr.splitlines()[0] == "wrong" and fork.stderr.splitlines()[-1] == new.stderr.splitlines()[-1]


def test_forks_leave_nothing_to_each_other(both):
    (_, first), (_, second) = both("script.py", "0"), both("script.py", "0")
    assert first.stdout == second.stdout
