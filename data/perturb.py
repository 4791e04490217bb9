"""Perturbed copies of a clip for the temporal reward: the same frames, their order or presence in time disturbed.

The idea is the paper's figure: the answer to the raw clip should earn more than the answer to a perturbed copy,
R_raw > R_perturbed. The six kinds and their constants are those of the released code.

Legend: F frames, H and W their height and width in pixels.

A perturbation is called with `frames` (F, 3, H, W) and a generator and returns a new tensor of the same shape. Its
`index(F, generator)` is the whole of it: int64 (F,), which frame stands at each place, BLANK for a black one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data.samplers import check_at_least

BLANK = -1
DRAWS = 8  # tries of one kind before RandomPerturbation gives it up


class Perturbation(ABC):
    """What the six kinds share: frames are rearranged by an index."""

    @abstractmethod
    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor: ...

    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        index = self.index(len(frames), generator)
        perturbed = frames[index.clamp(min=0)]
        perturbed[index == BLANK] = 0
        return perturbed


@dataclass(frozen=True)
class Shuffle(Perturbation):
    """All frames in random order."""

    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(num_frames, generator=generator)


@dataclass(frozen=True)
class LocalShuffle(Perturbation):
    """Random order within each run of `window` frames."""

    window: int = 4

    def __post_init__(self) -> None:
        check_at_least(2, window=self.window)

    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        runs = torch.arange(num_frames).split(self.window)
        return torch.cat([run[torch.randperm(len(run), generator=generator)] for run in runs])


@dataclass(frozen=True)
class Reverse(Perturbation):
    """Last frame first."""

    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(num_frames).flip(0)


@dataclass(frozen=True)
class Jitter(Perturbation):
    """Each place takes a frame at most `radius` places away, so frames repeat, vanish or swap."""

    radius: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, radius=self.radius)

    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        offset = torch.randint(-self.radius, self.radius + 1, (num_frames,), generator=generator)
        return (torch.arange(num_frames) + offset).clamp(0, num_frames - 1)


@dataclass(frozen=True)
class Duplicate(Perturbation):
    """1 to `max_copies` copies follow one frame, and as many other frames go: a freeze, then jumps."""

    max_copies: int = 3

    def __post_init__(self) -> None:
        check_at_least(1, max_copies=self.max_copies)

    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        copies = _draw_count(self.max_copies, num_frames, generator)
        frozen, *others = torch.randperm(num_frames, generator=generator).tolist()
        return torch.tensor(sorted([frozen] * (1 + copies) + others[copies:]))


@dataclass(frozen=True)
class Drop(Perturbation):
    """1 to `max_frames` frames turn black; at least one stays."""

    max_frames: int = 3

    def __post_init__(self) -> None:
        check_at_least(1, max_frames=self.max_frames)

    def index(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        dropped = _draw_count(self.max_frames, num_frames, generator)
        index = torch.arange(num_frames)
        index[torch.randperm(num_frames, generator=generator)[:dropped]] = BLANK
        return index


def _draw_count(most: int, num_frames: int, generator: torch.Generator) -> int:
    """Uniform in 1..most, but never all the frames."""
    return min(int(torch.randint(1, most + 1, (), generator=generator)), num_frames - 1)


PERTURBATIONS = {
    "shuffle": Shuffle,
    "local-shuffle": LocalShuffle,
    "reverse": Reverse,
    "jitter": Jitter,
    "duplicate": Duplicate,
    "drop": Drop,
}


class Perturbed(NamedTuple):
    """`frames` (F, 3, H, W) and the `kind` that made them; the clip's own frames and None if it cannot be perturbed."""

    frames: torch.Tensor
    kind: str | None


class RandomPerturbation:
    """One kind per clip, drawn uniformly, whose result really differs from the clip in the pixels of some frame.

    A draw that changes nothing (it put equal frames in each other's place) is repeated up to DRAWS times, then another
    kind is tried. A clip whose frames are all equal, as a 1-frame clip's are, has no order in time to disturb and is
    never perturbed, not even by Drop.

    `kinds`: names from PERTURBATIONS; all six when None.
    """

    def __init__(self, kinds: Sequence[str] | None = None):
        kinds = list(PERTURBATIONS) if kinds is None else list(kinds)
        if not kinds or not set(kinds) <= PERTURBATIONS.keys():
            raise ValueError(f"kinds must be some of {', '.join(PERTURBATIONS)}; got {kinds}")
        self.perturbations = {kind: PERTURBATIONS[kind]() for kind in kinds}

    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> Perturbed:
        if (frames == frames[:1]).all():
            return Perturbed(frames, kind=None)
        kinds = list(self.perturbations)
        for which in torch.randperm(len(kinds), generator=generator).tolist():
            perturbed = self._changed(kinds[which], frames, generator)
            if perturbed is not None:
                return Perturbed(perturbed, kinds[which])
        return Perturbed(frames, kind=None)

    def same_kind(self, kind: str | None, clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Dense clips (K, L, 3, H, W) of a video whose frames were perturbed by `kind`: each by the same, drawn anew.

        A clip whose frames are all equal, or that no draw changes, is left as it is; all are where `kind` is None.
        """
        if kind is None:
            return clips
        copies = []
        for clip in clips:
            still = (clip == clip[:1]).all()
            copy = None if still else self._changed(kind, clip, generator)
            copies.append(clip if copy is None else copy)
        return torch.stack(copies)

    def _changed(self, kind: str, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        for _ in range(DRAWS):
            perturbed = self.perturbations[kind](frames, generator)
            if not torch.equal(perturbed, frames):
                return perturbed
        return None
