"""Python programs without their seconds of imports: each runs in a fork of a process that has done the slow ones.

A fork is taken before anything of the project is imported. It is not quite a process of its own: it cannot show that
its program forgets to import a package; variables that packages read while they are imported have the values of the
server; and it ends as multiprocessing's processes do, without the functions of `atexit`. So what is tested of a process
itself needs a new one. Needs a POSIX system.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

TIMEOUT_S = 900


def run(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess:
    """What `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` returns.

    command: `sys.executable`, then a script or `-m` and a module, then arguments. SIGALRM ends it after TIMEOUT_S.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, "stdout"), Path(folder, "stderr")]
        job = {"words": command[1:], "cwd": str(cwd), "env": dict(env), "outputs": list(map(str, outputs))}
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(path.read_text() for path in outputs))


@cache
def _server() -> subprocess.Popen:
    """One for all commands; it ends with this process, since its stdin closes then."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], env=env, stdin=pipe, stdout=pipe, text=True)


def _run(words: list[str], cwd: str, env: dict[str, str], outputs: list[str]) -> None:
    """What a fork does: become the command, its output in files."""
    signal.alarm(TIMEOUT_S)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    module = words[0] == "-m"
    sys.argv = words[module:]
    first = cwd if module else str(Path(words[0]).resolve().parent)
    sys.path[:1] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for package in ("av", "scipy.stats", "torch.distributed.fsdp", "transformers.models.internvl.modeling_internvl"):
        importlib.import_module(package)
    for line in sys.stdin:
        fork = multiprocessing.get_context("fork").Process(target=_run, kwargs=json.loads(line))
        fork.start()
        fork.join()
        print(fork.exitcode, flush=True)
