"""Frame samplers: which F frames of a video the model sees, by frame index or by time.

Legend: F frames asked for (`frames`); `num_frames` pictures that the file really holds; K clips of L frames each.

A sampler gives a LongTensor (F,) of non-decreasing indices in [0, num_frames); `WithMotionClips` adds others. A video
with fewer than F frames has some of them repeated. One that goes by index is called with `num_frames` >= 1; one that
goes by time (`by_time`) with the time of each picture in seconds since the first, float64 (num_frames,), ascending.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


class Sampler(Protocol):
    """by_time: what the first argument is. random: whether a generator changes the choice."""

    @property
    def by_time(self) -> bool: ...

    @property
    def random(self) -> bool: ...

    def __call__(self, pictures: int | torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor: ...


def check_at_least(minimum: int, **values: int) -> None:
    """Raise ValueError naming the first of `values` that is not a whole number of at least `minimum`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


@dataclass(frozen=True)
class UniformSampler:
    """Evenly spaced frames by the index rule of the released code, the same for every call.

    With n = num_frames - 1 and seg = n / F, frame k is int(seg / 2 + round(seg * k)), halves rounded to even.

    >>> UniformSampler(frames=4)(num_frames=10).tolist()
    [1, 3, 5, 8]
    """

    by_time: ClassVar[bool] = False
    random: ClassVar[bool] = False
    frames: int

    def __post_init__(self) -> None:
        check_at_least(1, frames=self.frames)

    def __call__(self, num_frames: int, generator: torch.Generator | None = None) -> torch.Tensor:
        segment = (num_frames - 1) / self.frames
        return torch.tensor([int(segment / 2 + round(segment * k)) for k in range(self.frames)])


@dataclass(frozen=True)
class UniformTimeSampler:
    """The pictures on screen in the middles of F equal stretches of time, the same for every call. Ours.

    The stretches divide the time from the first picture's to the last's. With a variable frame rate this is what a
    viewer sees at even intervals, where `UniformSampler` takes more frames from where there are more.

    >>> UniformTimeSampler(frames=2)(torch.tensor([0.0, 0.1, 0.2, 0.3, 2.0])).tolist()
    [3, 3]
    """

    by_time: ClassVar[bool] = True
    random: ClassVar[bool] = False
    frames: int

    def __post_init__(self) -> None:
        check_at_least(1, frames=self.frames)

    def __call__(self, times_s: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        middles = (torch.arange(self.frames, dtype=torch.float64) + 0.5) / self.frames
        return torch.searchsorted(times_s, middles * times_s[-1], right=True) - 1


@dataclass(frozen=True)
class RandomSegmentSampler:
    """One uniformly random frame from each of F equal segments; the call needs a generator. Ours, after TSN's sampling.

    Segment k holds the frames floor(k * num_frames / F) up to, not including, floor((k + 1) * num_frames / F); an
    empty one (num_frames < F) gives the frame that it starts at.
    """

    by_time: ClassVar[bool] = False
    random: ClassVar[bool] = True
    frames: int

    def __post_init__(self) -> None:
        check_at_least(1, frames=self.frames)

    def __call__(self, num_frames: int, generator: torch.Generator | None = None) -> torch.Tensor:
        if generator is None:
            raise ValueError("the random-segment sampler needs a generator")
        edges = torch.arange(self.frames + 1) * num_frames // self.frames
        # float64: a float32 uniform could not reach every frame of a very long segment.
        offset = torch.rand(self.frames, generator=generator, dtype=torch.float64) * edges.diff()
        return edges[:-1] + offset.long()


@dataclass(frozen=True)
class DenseClipSampler:
    """F frames in a row, `stride` apart: centred, or from a random start when given a generator. Ours.

    A video too short for that starts at its first frame and holds its last.

    >>> DenseClipSampler(frames=4, stride=2)(num_frames=11).tolist()
    [2, 4, 6, 8]
    """

    by_time: ClassVar[bool] = False
    random: ClassVar[bool] = True
    frames: int
    stride: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, frames=self.frames, stride=self.stride)

    def __call__(self, num_frames: int, generator: torch.Generator | None = None) -> torch.Tensor:
        run = self.stride * torch.arange(self.frames)
        spare = max(0, num_frames - 1 - int(run[-1]))
        start = spare // 2 if generator is None else torch.randint(spare + 1, (), generator=generator)
        return (start + run).clamp(max=num_frames - 1)


SAMPLERS = {
    "uniform": UniformSampler,
    "uniform-time": UniformTimeSampler,
    "random-segment": RandomSegmentSampler,
    "dense": DenseClipSampler,
}

# Pictures from one frame of a dense clip to the next: DATA.SAMPLING_RATE in PySlowFast's SLOWFAST_8x8_R50.yaml.
CLIP_STRIDE = 2


@dataclass(frozen=True)
class WithMotionClips:
    """A sampler's F frames, and behind them K dense clips for a motion encoder, one after the other. Ours.

    `clips` (K) runs of `frames` (L) pictures, `stride` apart, are centred in K equal parts of the video: of its time if
    the sampler goes by time, else of its pictures. One that would reach over an end is moved inside; a video too short
    for a clip starts at its first frame and holds its last. Nothing in the clips is drawn. One sampler for both, so
    that a file is decoded once.

    >>> WithMotionClips(UniformSampler(frames=2), clips=2, frames=4)(24).tolist()
    [5, 17, 2, 4, 6, 8, 14, 16, 18, 20]
    """

    sampler: Sampler
    clips: int
    frames: int
    stride: int = CLIP_STRIDE

    def __post_init__(self) -> None:
        check_at_least(1, clips=self.clips, frames=self.frames, stride=self.stride)

    @property
    def by_time(self) -> bool:
        return self.sampler.by_time

    @property
    def random(self) -> bool:
        return self.sampler.random

    def __call__(self, pictures: int | torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if self.by_time:
            num_frames, twice_middle = len(pictures), 2 * UniformTimeSampler(self.clips)(pictures)
        else:
            num_frames = pictures
            twice_middle = (2 * torch.arange(self.clips) + 1) * num_frames // self.clips - 1
        run = self.stride * torch.arange(self.frames)
        start = ((twice_middle - run[-1]) // 2).clamp(max=num_frames - 1 - run[-1]).clamp(min=0)
        clips = (start[:, None] + run).clamp(max=num_frames - 1)
        return torch.cat([self.sampler(pictures, generator), clips.flatten()])


def frames_and_clips(pixels: torch.Tensor, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `sampler` chose, as the frames (F, ...) and the dense clips (K, L, ...): None but for `WithMotionClips`."""
    if not isinstance(sampler, WithMotionClips):
        return pixels, None
    dense = sampler.clips * sampler.frames
    return pixels[:-dense], pixels[-dense:].unflatten(0, (sampler.clips, sampler.frames))
