import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import data.dataset
from data import decode, isolated
from data.dataset import ClipDataset, ClipLoader, Failure, NoReadableClip, StepBatches, collate, seeded_generator
from data.frame_cache import FrameCache
from data.labels import Clip
from data.perturb import RandomPerturbation
from data.samplers import DenseClipSampler, RandomSegmentSampler, UniformSampler, WithMotionClips
from data.video import Frames, MediaError, read_frames, resize_square

ROOT = Path(__file__).resolve().parents[1]
FRAMES, SIZE = 4, 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five clips of 9 brightening pictures, one frozen clip of black ones, one that is no video, and one cut short."""
    root = tmp_path_factory.mktemp("videos")
    for name, step in [*((f"{i}.mp4", 20 + i) for i in range(5)), ("frozen.mp4", 0)]:
        with av.open(str(root / name), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for k in range(9):
                picture = np.full((32, 48, 3), k * step, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    (root / "broken.mp4").write_text("not a video")
    with av.open(str(root / "0.mp4")) as source, av.open(str(root / "cut.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams[0])
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    whole = (root / "cut.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(whole[: len(whole) - 300])
    return root


def clips_of(*names):
    return [Clip(name, 10.0 * (i + 1), (0.0, 100.0), "D", "train") for i, name in enumerate(names)]


def dataset(root, *names, perturbation=None, sampler=None, seed=3, **options):
    names = names or [f"{i}.mp4" for i in range(5)]
    sampler = sampler or RandomSegmentSampler(FRAMES)
    return ClipDataset(clips_of(*names), root, sampler, SIZE, perturbation, seed, **options)


def due(step):
    """The keys of the clips of a step if all can be read."""
    return [next(iter(slot)) for slot in step]


def test_sample_is_the_squashed_frames_of_its_clip(root):
    sample = dataset(root, sampler=UniformSampler(FRAMES))[0, 2]
    expected = resize_square(read_frames(root / "2.mp4", UniformSampler(FRAMES)).pixels, SIZE)
    assert torch.equal(sample.frames, expected) and sample.frames.shape == (FRAMES, 3, SIZE, SIZE)
    assert (sample.clip.path, sample.index, sample.perturbed, sample.perturbation) == ("2.mp4", 2, None, None)


def test_sample_is_a_function_of_seed_epoch_and_index(root):
    data = dataset(root, perturbation=RandomPerturbation())
    keys = [(epoch, index) for epoch in range(4) for index in range(3)]
    forward = {key: data[key] for key in keys}
    again = dataset(root, perturbation=RandomPerturbation())
    for key in reversed(keys):
        assert torch.equal(again[key].frames, forward[key].frames)
        assert torch.equal(again[key].perturbed, forward[key].perturbed)
        assert again[key].perturbation == forward[key].perturbation
    for changing in ([forward[epoch, 0] for epoch in range(4)], [forward[0, index] for index in range(3)]):
        assert len({sample.perturbation for sample in changing}) > 1
    assert not torch.equal(forward[0, 0].frames, forward[1, 0].frames)
    other = dataset(root, perturbation=RandomPerturbation(), seed=4)
    assert any(not torch.equal(other[key].frames, forward[key].frames) for key in keys)


def test_seeded_generator_tells_every_key_apart():
    keys = [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (10, 1), (1, 1), (1, 0, 1), (-1,), (2**40,), ("1",), ("a", 1)]
    draws = [torch.rand(2, generator=seeded_generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws == [torch.rand(2, generator=seeded_generator(*key)).tolist() for key in keys]


def test_collate_stacks_and_reports_the_unperturbable(root):
    data = dataset(root, "0.mp4", "frozen.mp4", "3.mp4", perturbation=RandomPerturbation(["shuffle"]))
    batch = collate(data.__getitems__([[(0, 2)], [(0, 1)], [(0, 0)]]))
    assert [clip.path for clip in batch.clips] == ["3.mp4", "frozen.mp4", "0.mp4"]
    assert batch.frames.shape == batch.perturbed.shape == (3, FRAMES, 3, SIZE, SIZE)
    assert batch.frames.dtype == batch.perturbed.dtype == torch.uint8
    assert batch.perturbed_ok.tolist() == [True, False, True] and batch.kinds == ["shuffle", None, "shuffle"]
    assert [torch.equal(a, b) for a, b in zip(batch.frames, batch.perturbed)] == [False, True, False]
    assert batch.targets.dtype == torch.float32 and batch.targets.tolist() == pytest.approx([2.2, 1.8, 1.4])
    assert batch.index.tolist() == [2, 1, 0] and batch.flags == [frozenset()] * 3 and batch.failures == []


def test_without_perturbation_there_is_no_copy(root):
    batch = collate(dataset(root).__getitems__([[(0, 0)], [(0, 1)]]))
    assert batch.perturbed is None and batch.perturbed_ok.tolist() == [False, False] and batch.kinds == [None, None]


def test_an_unreadable_clip_names_itself(root):
    data = dataset(root, "0.mp4", "broken.mp4")
    with pytest.raises(MediaError, match=r"broken\.mp4: unreadable"):
        data[0, 1]


def test_bad_size_is_refused_by_name(root):
    with pytest.raises(ValueError, match="size must be a whole number of at least 1, got 0"):
        ClipDataset(clips_of("0.mp4"), root, UniformSampler(FRAMES), size=0)


def test_an_epoch_is_a_permutation_cut_into_steps():
    steps = [due(step) for step in StepBatches(num_clips=11, videos_per_step=4, seed=0, steps=200)]
    assert len(steps) == 200 and all(len({index for _, index in step}) == 4 for step in steps)
    sat_out = set()
    for epoch, first in enumerate(range(0, 200, 2)):  # two whole steps fit in 11 clips
        keys = steps[first] + steps[first + 1]
        assert {e for e, _ in keys} == {epoch} and len({index for _, index in keys}) == 8
        sat_out |= set(range(11)) - {index for _, index in keys}
    assert sat_out == set(range(11))
    assert steps[0] != steps[2]


def test_steps_follow_from_seed_and_number():
    whole = list(StepBatches(9, 3, seed=5, steps=20))
    assert list(StepBatches(9, 3, seed=5, steps=20, start_step=7)) == whole[7:]
    assert list(StepBatches(9, 3, seed=6, steps=20)) != whole
    assert len(StepBatches(9, 3, seed=5, steps=20, start_step=7)) == 13
    assert len(StepBatches(9, 3, seed=5, steps=20, start_step=25)) == 0


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_out_each_step_in_order(world_size):
    whole = list(StepBatches(20, 6, seed=1, steps=9))
    ranks = [StepBatches(20, 6, seed=1, steps=9, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = list(zip(*ranks))
    assert [list(itertools.chain(*share)) for share in shares] == whole
    assert {len(part) for share in shares for part in share} == {6 // world_size}


@pytest.mark.parametrize(
    ("videos_per_step", "world_size", "says"),
    [
        (5, 2, "--videos-per-step 5 does not divide into 2 processes"),
        (12, 1, "--videos-per-step 12 is more than the 11 training clips"),
        (0, 1, "--videos-per-step must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_videos_per_step_is_refused_by_its_flag(videos_per_step, world_size, says):
    with pytest.raises(ValueError, match=says):
        StepBatches(11, videos_per_step, seed=0, steps=1, world_size=world_size)


def test_loader_yields_the_steps_and_leaves_global_random_state_alone(root):
    data, steps = dataset(root, perturbation=RandomPerturbation()), StepBatches(5, 2, seed=0, steps=3)
    state = torch.get_rng_state()
    batches = list(ClipLoader(data, steps))
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch.index.tolist() for batch in batches] == [[index for _, index in due(step)] for step in steps]


def test_worker_processes_change_nothing_and_keep_the_error_typed(root):
    data = dataset(root, "0.mp4", "1.mp4", "2.mp4", "broken.mp4", perturbation=RandomPerturbation())
    steps = [[[(0, 0)], [(0, 1)]], [[(1, 2)], [(1, 3), (1, 0)]], [[(1, 3)]]]
    loader = iter(ClipLoader(data, steps, num_workers=1))
    for expected, batch in zip(ClipLoader(data, steps[:2]), loader):
        assert torch.equal(batch.frames, expected.frames) and torch.equal(batch.perturbed, expected.perturbed)
        assert batch.clips == expected.clips and batch.kinds == expected.kinds
        assert batch.flags == expected.flags and batch.failures == expected.failures
    assert [failure.path for failure in batch.failures] == ["broken.mp4"]
    with pytest.raises(NoReadableClip, match=r"^broken\.mp4: unreadable") as caught:
        next(loader)
    assert [failure.path for failure in caught.value.failures] == ["broken.mp4"]


def test_workers_leave_signals_to_their_parent_and_end_with_it(root):
    program = (
        "import multiprocessing, signal\n"
        "from tests.test_dataset import *\n"
        "if __name__ == '__main__':\n"
        f"    loader = iter(ClipLoader(dataset(Path({str(root)!r})), StepBatches(5, 2, 0, 9), num_workers=1))\n"
        "    for step in range(8):\n"
        "        next(loader)\n"
        "        (worker,) = multiprocessing.active_children()\n"
        "        for number in (signal.SIGINT, signal.SIGTERM):\n"
        "            os.kill(worker.pid, number)\n"
        "    keep = [loader]; keep.append(keep)\n"  # as a traceback may, to the very end
    )
    (Path(root) / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, root / "program.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- clips that cannot be read


def queue(num_clips, videos_per_step, seed, step, slot):
    """The clips that may fill a place of a step, in order: every `videos_per_step`-th of the epoch, cyclically."""
    epoch, place = divmod(step, num_clips // videos_per_step)
    order = torch.randperm(num_clips, generator=seeded_generator(seed, "order", epoch)).tolist()
    position = place * videos_per_step + slot
    for _ in range(len(order[slot::videos_per_step])):
        yield order[position]
        position += videos_per_step
        if position >= num_clips:
            position = slot


def expected_steps(num_clips, videos_per_step, seed, steps, bad):
    """Per step: the clips that fill it, and for each those that failed before it."""
    for step in range(steps):
        filled, failed = [], []
        for slot in range(videos_per_step):
            tried = list(itertools.takewhile(bad.__contains__, queue(num_clips, videos_per_step, seed, step, slot)))
            failed.append(tried)
            filled.append(list(queue(num_clips, videos_per_step, seed, step, slot))[len(tried)])
        yield filled, failed


@pytest.fixture
def fake(monkeypatch):
    """A `read_frames` that fails for the paths in `fake.bad` and keeps a list of what it was asked for."""

    def read(path, sampler, generator=None, root=None, timeout_s=None):
        read.asked.append(path)
        if path in read.bad:
            raise MediaError("unreadable", path, f"{path} is bad")
        pixels = torch.full((FRAMES, 3, SIZE, SIZE), len(path), dtype=torch.uint8)
        index = torch.arange(FRAMES)
        return Frames(pixels, index, index.double(), FRAMES, frozenset())

    read.asked, read.bad = [], set()
    monkeypatch.setattr(data.dataset, "read_frames", read)
    return read


BAD = {0, 1, 4, 6, 9, 13, 18, 20, 22}


def load(num_clips, videos_per_step, steps, start_step=0, rank=0, world_size=1, known_bad=()):
    clips = ClipDataset(clips_of(*map(str, range(num_clips))), "", UniformSampler(FRAMES), SIZE, known_bad=known_bad)
    order = StepBatches(num_clips, videos_per_step, 7, steps, start_step, rank, world_size)
    return [(batch.index.tolist(), batch.failures) for batch in ClipLoader(clips, order)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stand_ins_are_the_next_clips_of_the_place_for_any_number_of_processes(fake, world_size):
    fake.bad = set(map(str, BAD))
    expected = list(expected_steps(23, 4, 7, 40, BAD))
    ranks = [load(23, 4, 40, rank=rank, world_size=world_size) for rank in range(world_size)]
    for shares, (filled, failed) in zip(zip(*ranks), expected, strict=True):
        assert [index for indices, _ in shares for index in indices] == filled
        assert len(set(filled)) == 4 and not BAD & set(filled)
        failures = [failure for _, failures in shares for failure in failures]
        assert failures == [Failure(i, str(i), "unreadable", f"{i} is bad") for tried in failed for i in tried]
    assert any(len(tried) > 1 for _, failed in expected for tried in failed)


def test_a_clip_that_sits_out_an_epoch_may_stand_in(fake):
    first, second, third, fourth, left_over = torch.randperm(5, generator=seeded_generator(7, "order", 0)).tolist()
    fake.bad = {str(first)}
    ((indices, failures),) = load(5, 4, 1)
    assert indices == [left_over, second, third, fourth] and [failure.index for failure in failures] == [first]


def test_resuming_in_mid_epoch_changes_nothing(fake):
    fake.bad = set(map(str, BAD))
    whole = load(23, 4, 40)
    known = {failure.index: failure for _, failures in whole[:13] for failure in failures}
    assert load(23, 4, 40, start_step=13) == whole[13:]
    fake.asked.clear()
    assert load(23, 4, 40, start_step=13, known_bad=known.values()) == whole[13:]
    assert known and not set(fake.asked) & {failure.path for failure in known.values()}


def test_a_bad_clip_is_tried_once(fake):
    fake.bad = set(map(str, BAD))
    failed = [failure.path for _, failures in load(23, 4, 40) for failure in failures]
    tried = [path for path in fake.asked if path in fake.bad]
    assert len(tried) == len(set(tried)) and set(tried) == set(failed) and len(failed) > len(tried)


def test_a_place_without_a_readable_clip_ends_the_run(fake):
    *_, last = queue(11, 4, 7, 1, 2)
    bad = set(queue(11, 4, 7, 1, 2))
    fake.bad = set(map(str, bad - {last}))
    assert load(11, 4, 2)[1][0][2] == last
    fake.bad = set(map(str, bad))
    due, *others = queue(11, 4, 7, 0, 2)
    with pytest.raises(NoReadableClip, match=rf"^{due}: unreadable .*nor can any of the {len(others)} clips") as caught:
        load(11, 4, 2)
    assert [failure.index for failure in caught.value.failures] == [due, *others]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_stand_ins_do_not_depend_on_workers(root, num_workers):
    names = ["0.mp4", "broken.mp4", "1.mp4", "gone.mp4", "2.mp4", "broken.mp4", "3.mp4", "cut.mkv"]
    steps = StepBatches(len(names), 2, seed=0, steps=8)
    here = list(ClipLoader(dataset(root, *names), steps))
    for (filled, failed), batch in zip(expected_steps(len(names), 2, 0, 8, {1, 3, 5}), here, strict=True):
        assert batch.index.tolist() == filled
        assert [failure.index for failure in batch.failures] == list(itertools.chain(*failed))
        assert {(f.path, f.reason) for f in batch.failures} <= {("broken.mp4", "unreadable"), ("gone.mp4", "missing")}
        assert batch.flags == [frozenset({"truncated"} if index == 7 else ()) for index in filled]
    loader = ClipLoader(dataset(root, *names, timeout_s=60.0), steps, num_workers)
    for expected, batch in zip(here, loader, strict=True):
        assert torch.equal(batch.frames, expected.frames) and torch.equal(batch.index, expected.index)
        assert batch.flags == expected.flags
        assert [f.reason for f in batch.failures] == [f.reason for f in expected.failures]


def test_with_a_time_limit_files_are_decoded_by_another_process(root, monkeypatch):
    limits = []
    monkeypatch.setattr(isolated, "pick", lambda path, choose, limit: limits.append(limit) or decode.pick(path, choose))
    dataset(root, timeout_s=7.5)[0, 0]
    dataset(root)[0, 0]
    assert limits == [7.5]


def test_a_slot_is_small_however_many_clips_there_are():
    (step,) = StepBatches(28_056, 16, seed=0, steps=1)
    assert len(pickle.dumps(step)) < 2000


def test_every_tensor_of_a_batch_is_pinned(root, monkeypatch):
    clips = WithMotionClips(UniformSampler(FRAMES), 1, 3)
    batch = collate(dataset(root, sampler=clips, perturbation=RandomPerturbation()).__getitems__([[(0, 0)], [(0, 1)]]))
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: ("pinned", tensor))
    pinned = batch.pin_memory()
    assert tensors >= {"frames", "perturbed", "targets", "motion_clips", "perturbed_motion_clips"}
    for name, value in vars(batch).items():
        copy = getattr(pinned, name)
        assert copy is value if name not in tensors else copy[0] == "pinned" and copy[1] is value


def test_a_loader_pins_if_it_is_asked_to(root, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    for pin_memory in (False, True):
        assert pinned == []
        (batch,) = ClipLoader(dataset(root), StepBatches(5, 2, 0, 1), pin_memory=pin_memory)
    assert any(tensor is batch.frames for tensor in pinned)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loader_pins_on_a_gpu_machine(root):
    (batch,) = ClipLoader(dataset(root), StepBatches(5, 2, 0, 1), pin_memory=True)
    assert batch.frames.is_pinned() and batch.targets.is_pinned()


# ---- dense clips


@pytest.mark.parametrize("inner", [UniformSampler(FRAMES), RandomSegmentSampler(FRAMES)])
def test_dense_clips_come_with_the_frames_and_change_nothing_about_them(root, inner):
    options = {"perturbation": RandomPerturbation()}
    plain, both = (dataset(root, sampler=sampler, **options) for sampler in (inner, WithMotionClips(inner, 2, 3)))
    for key in [(epoch, index) for epoch in range(4) for index in range(5)]:
        sample, expected = both[key], plain[key]
        assert torch.equal(sample.frames, expected.frames) and torch.equal(sample.perturbed, expected.perturbed)
        assert sample.perturbation == expected.perturbation
        assert expected.motion_clips is expected.perturbed_motion_clips is None
        pictures = resize_square(read_frames(root / f"{key[1]}.mp4", DenseClipSampler(9)).pixels, SIZE)
        clips = torch.stack([pictures[[0, 2, 4]], pictures[[4, 6, 8]]])  # middles of 0 to 3.5 and 4.5 to 8
        assert torch.equal(sample.motion_clips, clips)
        assert sample.perturbed_motion_clips.shape == clips.shape
        assert all((a != b).any() for a, b in zip(sample.perturbed_motion_clips, clips))
        assert torch.equal(both[key].perturbed_motion_clips, sample.perturbed_motion_clips)


def test_dense_clips_are_batched_by_loaders_too(root):
    sampler = WithMotionClips(UniformSampler(FRAMES), 2, 3)
    data = dataset(root, "0.mp4", "frozen.mp4", "1.mp4", sampler=sampler, perturbation=RandomPerturbation())
    (batch,) = ClipLoader(data, [[[(0, 0)], [(0, 1)], [(0, 2)]]])
    assert batch.frames.shape == (3, FRAMES, 3, SIZE, SIZE)
    assert batch.motion_clips.shape == batch.perturbed_motion_clips.shape == (3, 2, 3, 3, SIZE, SIZE)
    assert batch.motion_clips.dtype == torch.uint8 and batch.perturbed_ok.tolist() == [True, False, True]
    same = [torch.equal(a, b) for a, b in zip(batch.motion_clips, batch.perturbed_motion_clips)]
    assert same == [False, True, False]
    assert torch.equal(batch.motion_clips[2], data[0, 2].motion_clips)
    (unperturbed,) = ClipLoader(dataset(root, sampler=sampler), StepBatches(5, 2, 0, 1))
    assert unperturbed.motion_clips.shape == (2, 2, 3, 3, SIZE, SIZE) and unperturbed.perturbed_motion_clips is None


def test_cached_clips_are_the_decoded_ones(root, tmp_path, monkeypatch):
    samplers = [UniformSampler(FRAMES), *(WithMotionClips(UniformSampler(FRAMES), clips, 3) for clips in (1, 2))]
    expected = [dataset(root, sampler=sampler)[0, 0] for sampler in samplers]
    for reader in (read_frames, None):  # the second time nothing may be decoded
        monkeypatch.setattr(data.dataset, "read_frames", reader)
        for sampler, sample in zip(samplers, expected):
            cached = dataset(root, sampler=sampler, cache=FrameCache(tmp_path, 10**9))[0, 0]
            assert torch.equal(cached.frames, sample.frames)
            assert (cached.motion_clips is None) == (sample.motion_clips is None)
            assert sample.motion_clips is None or torch.equal(cached.motion_clips, sample.motion_clips)
    with pytest.raises(ValueError, match=r"--frame-cache .* draws new ones"):
        dataset(root, sampler=WithMotionClips(RandomSegmentSampler(4), 1, 3), cache=FrameCache(tmp_path, 10**9))


# ---- decoding once


def test_a_video_is_decoded_once_for_its_frames_and_their_perturbed_copy(root, fake):
    dataset(root, perturbation=RandomPerturbation())[0, 2]
    assert fake.asked == ["2.mp4"]


def test_cached_frames_are_the_decoded_ones(root, tmp_path, monkeypatch):
    options = {"sampler": UniformSampler(FRAMES), "perturbation": RandomPerturbation()}
    plain = dataset(root, "0.mp4", "cut.mkv", **options)
    cached = dataset(root, "0.mp4", "cut.mkv", **options, cache=FrameCache(tmp_path, limit_bytes=10**9))
    keys = [(epoch, index) for epoch in range(2) for index in range(2)]
    expected = [plain[key] for key in keys]
    assert [sample.flags for sample in expected[:2]] == [frozenset(), frozenset({"truncated"})]
    for reader in (read_frames, None):  # the second time nothing may be decoded
        monkeypatch.setattr(data.dataset, "read_frames", reader)
        for key, sample in zip(keys, expected):
            assert torch.equal(cached[key].frames, sample.frames) and cached[key].flags == sample.flags
            assert torch.equal(cached[key].perturbed, sample.perturbed) and cached[key].index == sample.index


def test_a_bad_file_says_so_with_a_cache_too(root, tmp_path):
    clips = dataset(root, "gone.mp4", "broken.mp4", sampler=UniformSampler(2), cache=FrameCache(tmp_path, 10**9))
    for index, reason in enumerate(["missing", "unreadable"]):
        with pytest.raises(MediaError, match=reason):
            clips[0, index]
    assert list(tmp_path.iterdir()) == []


def test_a_random_sampler_cannot_be_cached(root, tmp_path):
    with pytest.raises(ValueError, match=r"--frame-cache .* RandomSegmentSampler\(frames=4\) draws new ones"):
        dataset(root, cache=FrameCache(tmp_path, 10**9))
