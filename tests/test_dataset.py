import itertools

import av
import numpy as np
import pytest
import torch

from data.dataset import ClipDataset, ClipLoader, StepBatches, collate, seeded_generator
from data.labels import Clip
from data.perturb import RandomPerturbation
from data.samplers import RandomSegmentSampler, UniformSampler
from data.video import MediaError, read_frames, resize_square

FRAMES, SIZE = 4, 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five clips of 9 brightening pictures, one frozen clip of black ones, and one that is no video."""
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
    return root


def clips_of(*names):
    return [Clip(name, 10.0 * (i + 1), (0.0, 100.0), "D", "train") for i, name in enumerate(names)]


def dataset(root, *names, perturbation=None, sampler=None, seed=3):
    names = names or [f"{i}.mp4" for i in range(5)]
    return ClipDataset(clips_of(*names), root, sampler or RandomSegmentSampler(FRAMES), SIZE, perturbation, seed)


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
    batch = collate(data.__getitems__([(0, 2), (0, 1), (0, 0)]))
    assert [clip.path for clip in batch.clips] == ["3.mp4", "frozen.mp4", "0.mp4"]
    assert batch.frames.shape == batch.perturbed.shape == (3, FRAMES, 3, SIZE, SIZE)
    assert batch.frames.dtype == batch.perturbed.dtype == torch.uint8
    assert batch.perturbed_ok.tolist() == [True, False, True] and batch.kinds == ["shuffle", None, "shuffle"]
    assert [torch.equal(a, b) for a, b in zip(batch.frames, batch.perturbed)] == [False, True, False]
    assert batch.targets.dtype == torch.float32 and batch.targets.tolist() == pytest.approx([2.2, 1.8, 1.4])
    assert batch.index.tolist() == [2, 1, 0]


def test_without_perturbation_there_is_no_copy(root):
    batch = collate(dataset(root).__getitems__([(0, 0), (0, 1)]))
    assert batch.perturbed is None and batch.perturbed_ok.tolist() == [False, False] and batch.kinds == [None, None]


def test_an_unreadable_clip_names_itself(root):
    data = dataset(root, "0.mp4", "broken.mp4")
    with pytest.raises(MediaError, match=r"broken\.mp4: unreadable"):
        data[0, 1]


def test_bad_size_is_refused_by_name(root):
    with pytest.raises(ValueError, match="size must be a whole number of at least 1, got 0"):
        ClipDataset(clips_of("0.mp4"), root, UniformSampler(FRAMES), size=0)


def test_an_epoch_is_a_permutation_cut_into_steps():
    steps = list(StepBatches(num_clips=11, videos_per_step=4, seed=0, steps=200))
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
    assert [batch.index.tolist() for batch in batches] == [[index for _, index in step] for step in steps]
    with pytest.raises(MediaError, match="broken"):
        list(ClipLoader(dataset(root, "0.mp4", "broken.mp4"), [[(0, 0)], [(0, 1)]]))


def test_worker_processes_change_nothing_and_keep_the_error_typed(root):
    data = dataset(root, "0.mp4", "1.mp4", "2.mp4", "broken.mp4", perturbation=RandomPerturbation())
    steps = [[(0, 0), (0, 1)], [(1, 2), (1, 0)], [(1, 3)]]
    loader = iter(ClipLoader(data, steps, num_workers=1))
    for expected, batch in zip(ClipLoader(data, steps[:2]), loader):
        assert torch.equal(batch.frames, expected.frames) and torch.equal(batch.perturbed, expected.perturbed)
        assert batch.clips == expected.clips and batch.kinds == expected.kinds
    with pytest.raises(MediaError, match=r"broken\.mp4: unreadable") as caught:
        next(loader)
    assert caught.value.reason == "unreadable"
