import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data import decode, isolated
from data.decode import MediaError, Picked
from data.isolated import Decoder

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 30.0


def write_clip(path, width, height, frames):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(frames):
            shifted = np.ascontiguousarray(np.roll(picture, 5 * k, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "good.mp4", 64, 48, 20)


@pytest.fixture
def decoder():
    decoder = Decoder(misbehave)
    yield decoder
    decoder.close()


def first_middle_last(times_s):
    return np.array([0, len(times_s) // 2, len(times_s) - 1])


def misbehave(path, choose):
    """What the child runs here: `decode.pick`, or something worse, by the name of the file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    match Path(path).name:
        case "hangs":
            time.sleep(1e6)
        case "hangs-in-c":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
            sum(iter(int, 1))
        case "aborts":
            os.abort()
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exits":
            os._exit(3)
        case "faulty":
            raise TypeError("a bug")
        case "asks-twice":
            first, second = choose(np.array([0.0, 1.0])), choose(np.array([0.0, 2.0, 4.0]))
            return Picked({}, np.concatenate([first, second]), np.zeros(0), 3, frozenset())
        case "late":
            time.sleep(0.5)
        case "reports":
            fds = [f"/proc/self/fd/{fd}" for fd in sorted(os.listdir("/proc/self/fd"), key=int)]
            return {"torch": "torch" in sys.modules, "files": [os.readlink(fd) for fd in fds if os.path.lexists(fd)]}
    return decode.pick(path, choose)


def gone(process):
    """Whether a process that was ours has ended and been waited for."""
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    return process.returncode is not None


def test_the_result_is_that_of_decoding_here(clip):
    here, there = decode.pick(clip, first_middle_last), isolated.pick(clip, first_middle_last, LIMIT_S)
    assert here.pictures.keys() == there.pictures.keys() == {0, 10, 19}
    assert all(np.array_equal(here.pictures[k], there.pictures[k]) for k in here.pictures)
    assert there.index.tolist() == here.index.tolist() and there.times_s.tolist() == here.times_s.tolist()
    assert (there.num_frames, there.flags) == (here.num_frames, here.flags) == (20, frozenset())


def test_one_child_serves_all_files_and_holds_neither_torch_nor_our_files(decoder, clip):
    with open(clip, "rb") as ours:
        os.set_inheritable(ours.fileno(), True)
        report = decoder.pick("reports", first_middle_last, LIMIT_S)
    assert not report["torch"]
    stdin, _, _, *others = report["files"]
    assert stdin == os.devnull and [file.partition(":")[0] for file in others] == ["socket"]
    process = decoder._process
    decoder.pick(clip, first_middle_last, LIMIT_S)
    assert decoder._process is process


def test_faults_of_a_file_arrive_typed_and_with_the_path_as_given(decoder, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("not a video")
    for name, reason in (("none.mp4", "missing"), ("text.mp4", "unreadable"), (".", "refused")):
        with pytest.raises(MediaError) as caught:
            decoder.pick(name, first_middle_last, LIMIT_S)
        with pytest.raises(MediaError) as expected:
            decode.pick(name, first_middle_last)
        assert caught.value.args[:2] == expected.value.args[:2] == (reason, name)
    process = decoder._process
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # the child stays where it was started
    shutil.copy(clip, "here.mp4")
    assert decoder.pick("here.mp4", first_middle_last, LIMIT_S).num_frames == 20 and decoder._process is process


@pytest.mark.parametrize("name", ["hangs", "hangs-in-c", "late"])
def test_a_file_that_takes_too_long_is_given_up(decoder, clip, name):
    decoder.pick(clip, first_middle_last, LIMIT_S)
    process, start = decoder._process, time.monotonic()
    with pytest.raises(MediaError, match=f"^{name}: timeout") as caught:
        decoder.pick(name, first_middle_last, timeout_s=0.2)
    assert caught.value.reason == "timeout" and time.monotonic() - start < isolated.GRACE_S
    assert gone(process) and process.returncode == -signal.SIGALRM
    assert decoder.pick(clip, first_middle_last, LIMIT_S).num_frames == 20


def test_a_real_clip_too_large_for_its_limit_is_given_up(tmp_path, clip):
    large = write_clip(tmp_path / "large.mp4", 3840, 2160, 16)

    def every(times_s):
        return np.arange(len(times_s))

    with pytest.raises(MediaError, match=r"large\.mp4: timeout"):
        isolated.pick(large, every, timeout_s=0.05)
    assert isolated.pick(large, every, LIMIT_S).num_frames == 16
    assert isolated.pick(clip, every, LIMIT_S).num_frames == 20


@pytest.mark.parametrize(
    ("name", "says"), [("aborts", "signal 6"), ("crashes", "signal 11"), ("exits", "status 3"), ("faulty", "status 1")]
)
def test_a_crash_takes_the_child_only(decoder, clip, name, says):
    decoder.pick(clip, first_middle_last, LIMIT_S)
    process = decoder._process
    with pytest.raises(MediaError, match=says) as caught:
        decoder.pick(name, first_middle_last, LIMIT_S)
    assert (caught.value.reason, caught.value.path) == ("crashed", name) and gone(process)
    assert decoder.pick(clip, first_middle_last, LIMIT_S).num_frames == 20


def test_a_stopped_child_is_killed(decoder, clip, monkeypatch):
    monkeypatch.setattr(isolated, "GRACE_S", 0.3)
    decoder.pick(clip, first_middle_last, LIMIT_S)
    process = decoder._process
    with pytest.raises(MediaError, match="stops: timeout"):
        decoder.pick("stops", first_middle_last, timeout_s=0.2)
    assert gone(process) and process.returncode == -signal.SIGKILL
    assert decoder.pick(clip, first_middle_last, LIMIT_S).num_frames == 20


def test_a_child_that_died_between_two_files_is_no_fault_of_the_next(decoder, clip):
    decoder.pick(clip, first_middle_last, LIMIT_S)
    decoder._process.kill()
    decoder._process.wait()
    assert decoder.pick(clip, first_middle_last, LIMIT_S).num_frames == 20


def test_an_idle_child_outlives_the_limit_of_its_last_file(decoder, clip):
    decoder.pick(clip, first_middle_last, timeout_s=0.5)
    time.sleep(0.7)
    assert decoder._process.poll() is None


def test_starting_the_child_does_not_count(tmp_path, monkeypatch, clip, decoder):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert decoder.pick(clip, first_middle_last, timeout_s=0.8).num_frames == 20


def test_a_child_that_cannot_start_is_no_fault_of_the_file(monkeypatch, clip, decoder):
    for program in (shutil.which("false"), "/no/such/python"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(RuntimeError, match="the decoder process does not start"):
            decoder.pick(clip, first_middle_last, LIMIT_S)
    monkeypatch.undo()
    assert decoder.pick(clip, first_middle_last, LIMIT_S).num_frames == 20


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError("no"), EOFError("no"), KeyboardInterrupt(), MediaError("unreadable", "a", "b")]
)
def test_what_choose_raises_is_passed_on_and_the_next_file_gets_its_own_answer(decoder, clip, error):
    def fail(times_s):
        raise error

    with pytest.raises(type(error)) as caught:
        decoder.pick(clip, fail, LIMIT_S)
    assert caught.value is error
    assert decoder.pick(clip, first_middle_last, LIMIT_S).index.tolist() == [0, 10, 19]


def test_choose_may_be_asked_again(decoder):
    seen = []
    picked = decoder.pick("asks-twice", lambda times_s: seen.append(times_s.tolist()) or times_s.astype(int), LIMIT_S)
    assert seen == [[0.0, 1.0], [0.0, 2.0, 4.0]] and picked.index.tolist() == [0, 1, 0, 2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_is_left_to_the_parent(decoder, clip, number):
    def interrupt(times_s):
        os.kill(decoder._process.pid, number)
        time.sleep(0.2)
        return first_middle_last(times_s)

    assert decoder.pick(clip, interrupt, LIMIT_S).num_frames == 20


def test_threads_take_turns(decoder, clip):
    results = {}

    def work(k):
        results[k] = [decoder.pick(clip, lambda times_s: np.array([k]), LIMIT_S).index.tolist() for _ in range(5)]

    threads = [threading.Thread(target=work, args=[k]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [[k]] * 5 for k in range(4)}


def test_a_forked_process_gets_a_child_of_its_own(clip):
    isolated.pick(clip, first_middle_last, LIMIT_S)
    child = isolated._decoders[0]._process.pid
    with isolated._decoders[0]._lock:  # as if another thread were decoding
        forked = os.fork()
        if forked == 0:
            signal.alarm(20)
            try:
                ok = isolated.pick(clip, lambda times_s: np.array([7]), LIMIT_S).index.tolist() == [7]
                os._exit(0 if ok and isolated._decoders[0]._process.pid != child else 1)
            finally:
                os._exit(2)
    assert isolated.pick(clip, first_middle_last, LIMIT_S).index.tolist() == [0, 10, 19]
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert isolated._decoders[0]._process.pid == child


@pytest.mark.parametrize("job", ["good.mp4", "hangs"])
def test_the_child_ends_with_a_killed_parent(clip, job):
    program = (
        "import threading\n"
        "from tests.test_isolated import *\n"
        "decoder = Decoder(misbehave)\n"
        f"decoder.pick({clip!r}, first_middle_last, 30)\n"
        "print('ready', flush=True)\n"
        f"decoder.pick({str(Path(clip).with_name(job))!r}, first_middle_last, 1.0)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    parent.kill()
    assert parent.communicate(timeout=10) == (b"", None)  # the child has the same stdout: it ends when both have
