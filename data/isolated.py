"""`decode.pick` in a process of its own, so that a decoder that hangs or crashes takes nothing but itself with it.

The child is a plain subprocess, since the workers of a DataLoader may not start multiprocessing's. It imports numpy and
PyAV but no torch, decodes one file at a time, and ends when the socket to its parent closes, as it does when the parent
ends, however that ends. The time limit is an alarm that the child sets on itself: it goes off in the middle of C code,
and also when nobody is left to wait. Needs a POSIX system.
"""

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

import numpy as np

from data import decode
from data.decode import Choose, MediaError, Picked

SEND_BUFFER_BYTES = 2**22  # pictures take megabytes: fewer turns between the processes; the system may grant less
START_LIMIT_S = 60.0  # for the child's imports, from a slow disk
GRACE_S = 5.0  # past its limit, for a child that its alarm cannot end: a stopped one, or one that waits for a disk

# Ctrl-C reaches every process of the terminal, SIGTERM often every one of a job; what becomes of the child is for its
# parent to decide.
CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path = sys.argv[2:]
from data.isolated import serve
serve(int(sys.argv[1]))
"""


class Decoder:
    """A child process that runs the importable function `pick`; started when first needed, again when it has ended."""

    def __init__(self, pick: Callable[[str, Choose], Picked] = decode.pick):
        self._pick = pick
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def pick(self, path: str, choose: Choose, timeout_s: float) -> Picked:
        """What `decode.pick(path, choose)` gives. `choose` runs in this process, and what it raises is passed on.

        timeout_s: seconds, above 0, from opening the file to its last chosen picture; not for starting the child.

        Raises MediaError: those of `decode.pick`; `timeout`; `crashed` (the child ended in any other way). RuntimeError
        if no child can be started: no fault of the file.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                self._socket.settimeout(timeout_s + GRACE_S)
                answer = self._ask(path, (self._pick, os.path.abspath(path), timeout_s))
                while isinstance(answer, np.ndarray):  # not the result yet: times to choose from
                    answer = self._ask(path, choose(answer))
            except BaseException:  # the child may still be at work, or wait for an answer that nobody will give
                self.close()
                raise
        if isinstance(answer, MediaError):
            raise MediaError(answer.reason, path, answer.detail)
        return answer

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._wait()

    def _wait(self) -> int | None:
        """Wait for a child that is ending; its exit status as in `subprocess`, None if it does not end."""
        process, self._process = self._process, None
        self._answers.close()
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return process.returncode

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._answers = self._socket.makefile("rb")
        self._socket.settimeout(START_LIMIT_S)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", CHILD, str(theirs.fileno()), *map(str, sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},  # else numpy starts a thread for every core
                )
            pickle.load(self._answers)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the decoder process does not start: {type(error).__name__}: {error}") from error

    def _ask(self, path: str, message: object) -> object:
        try:
            self._socket.sendall(pickle.dumps(message))
            return pickle.load(self._answers)
        except TimeoutError as error:
            raise MediaError("timeout", path, "the decoder hangs where no alarm reaches it") from error
        except (EOFError, OSError, pickle.UnpicklingError) as error:  # the child has gone
            status = self._wait()
            if status == -signal.SIGALRM:
                raise MediaError("timeout", path, "not decoded within the time limit") from error
            how = f"signal {-status}, {signal.strsignal(-status)}" if (status or 0) < 0 else f"exit status {status}"
            raise MediaError("crashed", path, f"the decoder ended with {how}") from error


def pick(path: str, choose: Choose, timeout_s: float) -> Picked:
    """`Decoder.pick` of this process's first child."""
    return decoders(1)[0].pick(path, choose, timeout_s)


def decoders(count: int) -> list[Decoder]:
    """The first `count` of this process's decoders, to decode so many files at a time; they stay until it ends."""
    _decoders.extend(Decoder() for _ in range(count - len(_decoders)))
    return _decoders[:count]


def serve(socket_fd: int) -> None:
    """What the child does: answer jobs `(pick, path, timeout_s)` from a socket until its other end closes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process; a parent that ignores it hands that down
    with suppress(EOFError, ConnectionError), socket.socket(fileno=socket_fd) as ours, ours.makefile("rwb") as pipe:

        def ask(times_s: np.ndarray) -> np.ndarray:
            _send(pipe, times_s)
            return pickle.load(pipe)

        _send(pipe, "ready")
        while True:
            pick, path, timeout_s = pickle.load(pipe)
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            try:
                answer = pick(path, ask)
            except MediaError as error:
                answer = error
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(pipe, answer)


def _send(pipe: BinaryIO, message: object) -> None:
    pickle.dump(message, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _close() -> None:
    for decoder in _decoders:
        decoder.close()


def _renew() -> None:
    global _decoders
    _decoders = []


_renew()
atexit.register(_close)
os.register_at_fork(after_in_child=_renew)  # two processes talking to one child would read each other's answers
