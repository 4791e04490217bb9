import numpy as np
import pytest
import torch

from data.samplers import SAMPLERS, DenseClipSampler, RandomSegmentSampler, UniformSampler

LENGTHS = [1, 2, 3, 5, 6, 7, 12, 31, 240, 4097]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("frames", [1, 4, 6, 12])
@pytest.mark.parametrize("num_frames", LENGTHS)
def test_uniform_is_the_released_rule_in_numpy(num_frames, frames):
    segment = np.float64(num_frames - 1) / frames
    expected = [int(segment / 2 + np.round(segment * k)) for k in range(frames)]
    assert UniformSampler(frames)(num_frames).tolist() == expected


def test_uniform_rounds_halves_to_even():
    # n = 9, F = 6: seg * k = 1.5 -> 2, 4.5 -> 4, 7.5 -> 8; rounding up would give 5 at k = 3.
    assert UniformSampler(6)(10).tolist() == [0, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("frames", [1, 6, 12])
@pytest.mark.parametrize("num_frames", LENGTHS)
def test_every_sampler_gives_f_ordered_indices_in_range(name, num_frames, frames):
    for seed in range(5):
        index = SAMPLERS[name](frames)(num_frames, generator(seed))
        assert index.dtype == torch.int64 and index.shape == (frames,)
        assert index.min() >= 0 and index.max() < num_frames
        assert (index.diff() >= 0).all()
        assert torch.equal(index, SAMPLERS[name](frames)(num_frames, generator(seed)))


def test_random_segment_reaches_all_of_its_segment_and_nothing_else():
    num_frames, frames = 20, 6
    segments = [
        set(range(int(np.floor(k * num_frames / frames)), int(np.floor((k + 1) * num_frames / frames))))
        for k in range(frames)
    ]
    g = generator()
    drawn = torch.stack([RandomSegmentSampler(frames)(num_frames, g) for _ in range(400)])
    assert [set(column.tolist()) for column in drawn.T] == segments


def test_random_segment_is_uniform_in_its_segment():
    g = generator()
    drawn = torch.stack([RandomSegmentSampler(2)(8, g) for _ in range(4000)])
    counts = torch.bincount(drawn.flatten(), minlength=8)
    assert ((counts - 1000).abs() < 150).all()  # five standard deviations of a count


def test_random_segment_needs_a_generator():
    with pytest.raises(ValueError, match="needs a generator"):
        RandomSegmentSampler(6)(10)


@pytest.mark.parametrize(("num_frames", "stride"), [(1, 1), (5, 2), (6, 1), (11, 2), (12, 2), (40, 3)])
def test_dense_is_a_run_from_the_middle(num_frames, stride):
    spare = num_frames - (1 + 5 * stride)
    start = max(0, int(spare / 2))
    expected = [min(start + stride * k, num_frames - 1) for k in range(6)]
    assert DenseClipSampler(6, stride)(num_frames).tolist() == expected


def test_dense_with_a_generator_starts_anywhere():
    g = generator()
    runs = [DenseClipSampler(3, 2)(9, g) for _ in range(100)]
    assert {int(run[0]) for run in runs} == {0, 1, 2, 3, 4}
    assert all(run.diff().tolist() == [2, 2] for run in runs)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("frames", [0, -1, 2.0, "6", True, None])
def test_bad_frames_are_refused_by_name(name, frames):
    with pytest.raises(ValueError, match="frames must be a whole number of at least 1"):
        SAMPLERS[name](frames)


def test_bad_stride_is_refused_by_name():
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1, got 0"):
        DenseClipSampler(6, stride=0)
