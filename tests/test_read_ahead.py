"""data/read_ahead.py: files in order, some at a time, not too far ahead. Decoders are stand-ins here."""

import threading
from types import SimpleNamespace

import pytest
import torch

from data import read_ahead as module
from data.isolated import decoders
from data.read_ahead import read_ahead
from data.samplers import UniformSampler
from data.video import MediaError


class Files:
    """Stands in for `read_frames`: a file opens when it is let, and `begun` has those that were asked for."""

    def __init__(self, monkeypatch):
        self.begun, self.users, self.gates = [], [], {}
        monkeypatch.setattr(module, "read_frames", self.read)

    def read(self, path, sampler, root, timeout_s, decoder):
        self.begun.append(path)
        self.users.append(decoder)
        if path in self.gates:
            assert self.gates[path].wait(30)
        if path.startswith("bad"):
            raise MediaError("truncated", path, "cut")
        value = int(path)
        return SimpleNamespace(pixels=torch.full((2, 3, 8, 8), value, dtype=torch.uint8), flags=frozenset({path}))


@pytest.fixture
def files(monkeypatch):
    return Files(monkeypatch)


def read(paths, workers=2, ahead=4):
    return read_ahead(paths, UniformSampler(2), 4, 60.0, workers, ahead)


def test_files_come_in_order_and_resized_whatever_is_ready_first(files):
    files.gates["0"] = threading.Event()
    found = read(["0", "1", "bad", "3"])
    threading.Timer(0.2, files.gates["0"].set).start()
    rows = list(found)
    assert [row.path for row in rows] == ["0", "1", "bad", "3"]
    assert [None if row.pixels is None else row.pixels.unique().tolist() for row in rows] == [[0], [1], None, [3]]
    assert rows[0].pixels.shape == (2, 3, 4, 4) and rows[1].flags == {"1"} and rows[2].reason == "truncated"


def test_so_many_files_are_read_at_a_time_each_by_a_decoder_of_its_own(files):
    files.gates = {path: threading.Event() for path in "012"}
    found = read(["0", "1", "2"], workers=3)
    first = threading.Thread(target=next, args=(found,))
    first.start()
    for _ in range(3000):
        if len(files.begun) == 3:  # all at once: none of them has ended
            break
        threading.Event().wait(0.01)
    assert sorted(files.begun) == ["0", "1", "2"] and set(files.users) == set(decoders(3))
    for gate in files.gates.values():
        gate.set()
    first.join()
    assert [row.path for row in found] == ["1", "2"]


def test_it_reads_no_further_ahead_than_told_and_stops_when_closed(files):
    taken = []
    paths = (taken.append(k) or str(k) for k in range(100))
    found = read(paths, ahead=5)
    assert next(found).path == "0" and len(taken) == 5
    assert next(found).path == "1" and len(taken) == 6
    found.close()
    assert len(files.begun) <= 6 and len(taken) == 6
    assert list(read([])) == []
