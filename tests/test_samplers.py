from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch

from data.samplers import (
    SAMPLERS,
    DenseClipSampler,
    RandomSegmentSampler,
    UniformSampler,
    UniformTimeSampler,
    WithMotionClips,
    frames_and_clips,
)

LENGTHS = [1, 2, 3, 5, 6, 7, 12, 31, 240, 4097]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def irregular_times(num_frames):
    """Ascending times from 0, steps of 10 to 500 ms."""
    steps = torch.randint(10, 500, (num_frames - 1,), generator=generator(7), dtype=torch.float64) / 1000
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])


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
    sampler = SAMPLERS[name](frames)
    pictures = irregular_times(num_frames) if sampler.by_time else num_frames
    for seed in range(5):
        index = sampler(pictures, generator(seed))
        assert index.dtype == torch.int64 and index.shape == (frames,)
        assert index.min() >= 0 and index.max() < num_frames
        assert (index.diff() >= 0).all()
        assert torch.equal(index, sampler(pictures, generator(seed)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_random_says_whether_a_generator_changes_the_choice(name):
    sampler = SAMPLERS[name](3)
    pictures = irregular_times(240) if sampler.by_time else 240
    choices = {tuple(sampler(pictures, generator(seed)).tolist()) for seed in range(20)}
    assert (len(choices) > 1) == sampler.random


def on_screen(times_s, at):
    """The last picture that has begun by then."""
    return max(k for k, time in enumerate(times_s) if time <= at)


@pytest.mark.parametrize("frames", [1, 4, 6, 12])
@pytest.mark.parametrize("num_frames", LENGTHS[:-1])
def test_uniform_time_gives_the_pictures_on_screen_in_the_middles_of_equal_stretches(num_frames, frames):
    times_s = irregular_times(num_frames).tolist()
    expected = [on_screen(times_s, (k + 0.5) / frames * times_s[-1]) for k in range(frames)]
    assert UniformTimeSampler(frames)(torch.tensor(times_s, dtype=torch.float64)).tolist() == expected


def test_uniform_time_shows_a_long_still_as_often_as_a_viewer_sees_it():
    times_s = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 5.0, 10.0], dtype=torch.float64)
    assert UniformTimeSampler(10)(times_s).tolist() == [5, 5, 5, 5, 5, 6, 6, 6, 6, 6]
    assert UniformSampler(10)(8).tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 6, 6]


def test_uniform_time_with_one_time_for_all_gives_the_last_picture():
    assert UniformTimeSampler(3)(torch.zeros(4, dtype=torch.float64)).tolist() == [3, 3, 3]


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


# ---- dense clips behind the frames


def clip_by_loop(middle, num_frames, frames, stride):
    """A run around `middle`, a place among the pictures, moved inside; its last pictures held where it is too long."""
    start = floor(middle - Fraction(stride * (frames - 1), 2))
    while start + stride * (frames - 1) > num_frames - 1:
        start -= 1
    start = max(start, 0)
    return [min(start + stride * k, num_frames - 1) for k in range(frames)]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("clips", "frames", "stride"), [(1, 32, 2), (2, 5, 1), (3, 8, 3), (7, 4, 2), (2, 1, 2)])
@pytest.mark.parametrize("num_frames", LENGTHS[:-1])
def test_clips_lie_in_the_middles_of_equal_parts_behind_the_samplers_own_frames(
    name, clips, frames, stride, num_frames
):
    inner = SAMPLERS[name](6)
    sampler = WithMotionClips(inner, clips, frames, stride)
    times_s = irregular_times(num_frames)
    pictures = times_s if inner.by_time else num_frames
    expected = inner(pictures, generator(3)).tolist()
    for k in range(clips):
        middle = (k + Fraction(1, 2)) * num_frames / clips - Fraction(1, 2)
        if inner.by_time:
            middle = on_screen(times_s.tolist(), (k + 0.5) / clips * float(times_s[-1]))
        expected += clip_by_loop(middle, num_frames, frames, stride)
    index = sampler(pictures, generator(3))
    assert index.dtype == torch.int64 and index.tolist() == expected
    assert (sampler.by_time, sampler.random) == (inner.by_time, inner.random)


@pytest.mark.parametrize("num_frames", [1, 5, 62, 63, 64, 65, 240])
def test_one_clip_is_the_centred_dense_run(num_frames):
    index = WithMotionClips(UniformSampler(6), 1, 32)(num_frames)
    assert index[6:].tolist() == DenseClipSampler(32, stride=2)(num_frames).tolist()


def test_clips_are_told_from_frames():
    sampler = WithMotionClips(UniformSampler(6), 2, 4)
    pixels = torch.arange(14)[:, None, None, None].expand(-1, 3, 2, 2)
    frames, clips = frames_and_clips(pixels, sampler)
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5] and clips.shape == (2, 4, 3, 2, 2)
    assert clips[..., 0, 0, 0].tolist() == [[6, 7, 8, 9], [10, 11, 12, 13]]
    assert frames_and_clips(pixels, UniformSampler(14)) == (pixels, None)


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"clips": -1}, {"frames": 0}, {"clips": 1.0}, {"stride": 0}])
def test_bad_clips_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number of at least 1"):
        WithMotionClips(UniformSampler(6), **{"clips": 1, "frames": 8, **wrong})
