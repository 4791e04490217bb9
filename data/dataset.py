"""Clips as training batches. What a step sees is a function of the seed and the step number alone.

Legend: N videos of one rank's share of a step, F frames, S side in pixels.

Randomness never comes from a worker, a rank or an order: item (epoch, index) draws from its own generator, and the
clips of step s follow from (seed, s). So a run may be resumed, or spread over other processes, and see the same data.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from data.labels import Clip
from data.perturb import RandomPerturbation
from data.samplers import Sampler, check_at_least
from data.video import MediaError, read_frames, resize_square

Key = tuple[int, int]  # (epoch, index of the clip)


def seeded_generator(*key: int | str) -> torch.Generator:
    """A generator whose stream is a function of `key` and unrelated to that of any other key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True, eq=False)
class Sample:
    """One clip as the model gets it.

    frames: uint8 (F, 3, S, S). perturbed: the same shape, None without a perturbation; equal to `frames` where
    `perturbation`, the kind that made it, is None. index: the clip's place in the data set.
    """

    clip: Clip
    frames: torch.Tensor
    perturbed: torch.Tensor | None
    perturbation: str | None
    index: int


@dataclass(frozen=True, eq=False)
class Batch:
    """N samples.

    frames: uint8 (N, F, 3, S, S); perturbed: the same or None. perturbed_ok: bool (N,), True where the perturbed copy
    differs; kinds: the perturbation of each or None. targets: float32 (N,), MOS on 1..5. index: int64 (N,).
    """

    clips: list[Clip]
    frames: torch.Tensor
    perturbed: torch.Tensor | None
    perturbed_ok: torch.Tensor
    kinds: list[str | None]
    targets: torch.Tensor
    index: torch.Tensor


class ClipDataset(Dataset):
    """Decodes, samples and squashes one clip per key `(epoch, index)`; epochs differ only in their random draws.

    An unreadable file raises `video.MediaError`.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        root: str | Path,
        sampler: Sampler,
        size: int,
        perturbation: RandomPerturbation | None = None,
        seed: int = 0,
    ):
        check_at_least(1, size=size)
        self.clips, self.root, self.sampler, self.size = clips, Path(root), sampler, size
        self.perturbation, self.seed = perturbation, seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        clip = self.clips[index]
        generator = seeded_generator(self.seed, "clip", epoch, index)
        frames = resize_square(read_frames(self.root / clip.path, self.sampler, generator).pixels, self.size)
        perturbed, kind = (None, None) if self.perturbation is None else self.perturbation(frames, generator)
        return Sample(clip, frames, perturbed, kind, index)

    def __getitems__(self, keys: list[Key]) -> list[Sample] | MediaError:
        """What DataLoader calls for a batch. The error is returned, since a worker process would raise it as text."""
        try:
            return [self[key] for key in keys]
        except MediaError as error:
            return error


class StepBatches:
    """This rank's keys `(epoch, index)` of each step from `start_step` up to `steps`.

    Every epoch is a seeded permutation of the clips, cut into steps of `videos_per_step`; the remainder that fills no
    step sits out, other clips in each epoch. So no step crosses two epochs, and none holds a clip twice. Ranks take
    equal runs of a step, in rank order.
    """

    def __init__(
        self,
        num_clips: int,
        videos_per_step: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_at_least(1, **{"--videos-per-step": videos_per_step})
        if videos_per_step > num_clips:
            raise ValueError(f"--videos-per-step {videos_per_step} is more than the {num_clips} training clips")
        if videos_per_step % world_size:
            raise ValueError(f"--videos-per-step {videos_per_step} does not divide into {world_size} processes")
        self.num_clips, self.videos_per_step, self.seed = num_clips, videos_per_step, seed
        self.steps, self.start_step = steps, start_step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.videos_per_step // self.world_size
        for step in range(self.start_step, self.steps):
            epoch, place = divmod(step, self.num_clips // self.videos_per_step)
            order = torch.randperm(self.num_clips, generator=seeded_generator(self.seed, "order", epoch))
            first = place * self.videos_per_step + self.rank * share
            yield [(epoch, index) for index in order[first : first + share].tolist()]


def collate(samples: list[Sample] | MediaError) -> Batch | MediaError:
    """Stack samples to a batch; an error passes through to the process that consumes the batches."""
    if isinstance(samples, MediaError):
        return samples
    copies = [sample.perturbed for sample in samples]
    kinds = [sample.perturbation for sample in samples]
    return Batch(
        clips=[sample.clip for sample in samples],
        frames=torch.stack([sample.frames for sample in samples]),
        perturbed=None if copies[0] is None else torch.stack(copies),
        perturbed_ok=torch.tensor([kind is not None for kind in kinds]),
        kinds=kinds,
        targets=torch.tensor([sample.clip.target for sample in samples], dtype=torch.float32),
        index=torch.tensor([sample.index for sample in samples]),
    )


def raise_error(batch: Batch | MediaError) -> Batch:
    if isinstance(batch, MediaError):
        raise batch
    return batch


class ClipLoader(DataLoader):
    """Yields a Batch for each list of keys in `batches`, decoded ahead by `num_workers` processes (0: in this one).

    Raises MediaError for the first unreadable file, in this process and typed. Global random state is left alone.
    """

    def __init__(self, dataset: ClipDataset, batches: Iterable[list[Key]], num_workers: int = 0):
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,  # a fork would copy threads and CUDA state
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # DataLoader draws a worker seed; without this, from the global stream
        )

    def __iter__(self) -> Iterator[Batch]:
        return map(raise_error, super().__iter__())  # no generator: the workers start now, not with the first batch
