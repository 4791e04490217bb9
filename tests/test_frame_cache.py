import errno
import multiprocessing
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data.frame_cache import FrameCache, key_of
from data.samplers import UniformSampler, UniformTimeSampler, WithMotionClips

NONE = frozenset()
ROOT = Path(__file__).resolve().parents[1]


def some_pixels(seed=0, frames=4, side=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (frames, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture
def cache(tmp_path):
    return FrameCache(tmp_path / "cache", limit_bytes=10**8)


def files(cache):
    return sorted(cache.folder.iterdir())


def test_what_is_put_comes_back(cache):
    assert cache.get("a") is None
    cache.put("a", some_pixels(1), frozenset({"truncated", "hdr"}))
    cache.put("b", some_pixels(2), NONE)
    again = FrameCache(cache.folder, 0)
    for key, pixels, flags in (("a", some_pixels(1), {"truncated", "hdr"}), ("b", some_pixels(2), set())):
        found, found_flags = again.get(key)
        assert torch.equal(found, pixels) and found.dtype == torch.uint8 and found_flags == flags
    assert {file.suffix for file in files(cache)} == {".safetensors"}


def test_frames_in_any_memory_layout_are_kept(cache):
    pixels = some_pixels().permute(0, 1, 3, 2)
    cache.put("a", pixels, NONE)
    assert torch.equal(cache.get("a")[0], pixels)


def test_the_key_tells_apart_what_frames_depend_on(tmp_path):
    file, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (file, other):
        path.write_bytes(b"one")
        os.utime(path, ns=(10**18, 10**18))
    keys = [
        key_of(file, UniformSampler(4), 16),
        key_of(other, UniformSampler(4), 16),
        key_of(file, UniformSampler(5), 16),
        key_of(file, UniformTimeSampler(4), 16),
        key_of(file, UniformSampler(4), 17),
        *(
            key_of(file, WithMotionClips(UniformSampler(4), *sizes), 16)
            for sizes in [(1, 8), (2, 8), (1, 16), (1, 8, 3)]
        ),
        key_of(file, WithMotionClips(UniformTimeSampler(4), 1, 8), 16),
    ]
    (tmp_path / "link.mp4").symlink_to(file)
    assert key_of(tmp_path / "link.mp4", UniformSampler(4), 16) == keys[0]
    os.utime(file, ns=(10**18, 10**18 + 1))
    keys.append(key_of(file, UniformSampler(4), 16))
    file.write_bytes(b"longer")
    os.utime(file, ns=(10**18, 10**18))
    keys.append(key_of(file, UniformSampler(4), 16))
    assert len(set(keys)) == len(keys)
    with pytest.raises(FileNotFoundError):
        key_of(tmp_path / "none.mp4", UniformSampler(4), 16)


def test_the_key_is_the_same_in_every_process(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.mp4")  # not UTF-8
    file.write_bytes(b"x")
    program = (
        "import sys; from data.frame_cache import *; from data.samplers import *\n"
        "cache = FrameCache(sys.argv[2], 0); print(cache._file(key_of(sys.argv[1], UniformSampler(4), 16)).name)"
    )
    run = [sys.executable, "-c", program, str(file), str(tmp_path)]
    names = {subprocess.run(run, cwd=ROOT, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(names) == 1


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:100], lambda data: bytes(len(data)), flipped],
    ids=["empty", "cut", "cut in its header", "zeros", "one bit"],
)
def test_a_damaged_entry_is_absent_and_replaced(cache, damage):
    cache.put("a", some_pixels(), NONE)
    (file,) = files(cache)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get("a") is None
    cache.put("a", some_pixels(), NONE)
    assert torch.equal(cache.get("a")[0], some_pixels()) and files(cache) == [file]


def test_a_foreign_entry_is_absent_and_replaced(cache):
    cache.put("a", some_pixels(1), NONE)
    (file,) = files(cache)
    for name, metadata in (("pixels", None), ("pixels", {"key": "a"}), ("weights", {"key": "a"})):
        save_file({name: some_pixels()}, file, metadata)
        assert cache.get("a") is None
    cache.put("b", some_pixels(2), NONE)
    os.replace(next(other for other in files(cache) if other != file), file)
    assert cache.get("a") is None
    file.unlink()
    file.mkdir()
    assert cache.get("a") is None


def test_a_full_cache_keeps_what_it_has(tmp_path):
    FrameCache(tmp_path, 10**8).put("a", some_pixels(), NONE)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    one_short, exact = FrameCache(tmp_path, 2 * size - 1), FrameCache(tmp_path, 2 * size)
    one_short.put("b", some_pixels(), NONE)
    assert one_short.get("b") is None and one_short.get("a") is not None
    exact.put("b", some_pixels(), NONE)
    assert exact.get("b") is not None
    exact.put("c", some_pixels(), NONE)
    assert exact.get("c") is None and sum(file.stat().st_size for file in tmp_path.iterdir()) == 2 * size


def test_a_full_disk_drops_the_entry_and_warns_once(cache, monkeypatch):
    cache.put("a", some_pixels(), NONE)
    kept = files(cache)
    write_bytes = Path.write_bytes

    def half(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.warns(UserWarning, match="--frame-cache .*No space left on device") as caught:
        cache.put("a", some_pixels(), NONE)
    assert len(caught) == 1 and files(cache) == kept
    assert torch.equal(cache.get("a")[0], some_pixels())  # half an entry never has an entry's name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("b", some_pixels(), NONE)
    assert cache.get("b") is None


def test_a_folder_that_is_gone_drops_entries(tmp_path):
    cache = FrameCache(tmp_path / "cache", 10**8)
    cache.folder.rmdir()
    with pytest.warns(UserWarning, match="no more frames are kept"):
        cache.put("a", some_pixels(), NONE)
    assert cache.get("a") is None


def test_a_folder_that_cannot_be_made_is_refused_by_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--frame-cache .*file"):
        FrameCache(tmp_path / "file", 10**8)


def test_a_file_that_vanishes_while_the_folder_is_measured_does_no_harm(cache, monkeypatch):
    vanishing = cache.folder / "another process's.tmp"
    vanishing.write_bytes(b"x")
    scandir = os.scandir

    @contextmanager
    def scan(folder):
        with scandir(folder) as entries:
            found = list(entries)
        vanishing.unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scan)
    cache.put("a", some_pixels(), NONE)
    assert cache.get("a") is not None


def put_and_get(folder, keys):
    cache = FrameCache(folder, 10**8)
    for key in keys:
        cache.put(str(key), some_pixels(key, side=64), NONE)
        if not torch.equal(cache.get(str(key))[0], some_pixels(key, side=64)):
            sys.exit(1)


def test_two_processes_write_the_same_entries_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    keys = [key for key in range(10) for _ in range(20)]
    writers = [context.Process(target=put_and_get, args=(tmp_path, keys)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 10
    for file in tmp_path.iterdir():
        with safe_open(file, "pt") as entry:
            assert torch.equal(entry.get_tensor("pixels"), some_pixels(int(entry.metadata()["key"]), side=64))
