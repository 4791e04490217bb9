"""Clips as training batches. What a step sees is a function of the seed and the step number alone.

Legend: N videos of one rank's share of a step, F frames, K dense clips of L frames, S side in pixels.

Randomness never comes from a worker, a rank or an order: item (epoch, index) draws from its own generator, and the
clips of step s follow from (seed, s). So a run may be resumed, or spread over other processes, and see the same data.
The same holds for the clips that stand in for unreadable ones: each place in a step has its own queue of them.
"""

import atexit
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from data.frame_cache import FrameCache, check_cacheable, key_of
from data.labels import Clip
from data.perturb import RandomPerturbation
from data.samplers import Sampler, check_at_least, frames_and_clips
from data.video import MediaError, read_frames, resize_square

Key = tuple[int, int]  # (epoch, index of the clip)


def seeded_generator(*key: int | str) -> torch.Generator:
    """A generator whose stream is a function of `key` and unrelated to that of any other key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class Failure:
    """A clip that gave no frames: its place in the data set, its path in the label file, and the MediaError's words."""

    index: int
    path: str
    reason: str
    detail: str


class NoReadableClip(Exception):
    """A place in a step that no clip can fill. failures: of the clip that is due there, then of those to stand in."""

    def __init__(self, failures: list[Failure]):
        super().__init__(failures)  # so that it survives pickling between processes
        self.failures = failures

    def __str__(self) -> str:
        due, *others = self.failures
        return f"{due.path}: {due.reason} ({due.detail}); nor can any of the {len(others)} clips to stand in be read"


@dataclass(frozen=True, eq=False)
class Sample:
    """One clip as the model gets it.

    frames: uint8 (F, 3, S, S). perturbed: the same shape, None without a perturbation; equal to `frames` where
    `perturbation`, the kind that made it, is None. index: the clip's place in the data set. flags: what is unusual
    about its file, see `video.Frames`. failures: the clips that it stands in for. motion_clips, perturbed_motion_clips:
    uint8 (K, L, 3, S, S), with a sampler `WithMotionClips` only; the second is perturbed by the same kind.
    """

    clip: Clip
    frames: torch.Tensor
    perturbed: torch.Tensor | None
    perturbation: str | None
    index: int
    flags: frozenset[str]
    failures: tuple[Failure, ...] = ()
    motion_clips: torch.Tensor | None = None
    perturbed_motion_clips: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """N samples.

    frames: uint8 (N, F, 3, S, S); perturbed: the same or None. perturbed_ok: bool (N,), True where the perturbed copy
    differs; kinds: the perturbation of each or None. targets: float32 (N,), MOS on 1..5. index: int64 (N,). flags: of
    the file of each. failures: every clip that was due and gave no frames, found out now or known from before.
    motion_clips, perturbed_motion_clips: uint8 (N, K, L, 3, S, S) or None.
    """

    clips: list[Clip]
    frames: torch.Tensor
    perturbed: torch.Tensor | None
    perturbed_ok: torch.Tensor
    kinds: list[str | None]
    targets: torch.Tensor
    index: torch.Tensor
    flags: list[frozenset[str]]
    failures: list[Failure]
    motion_clips: torch.Tensor | None = None
    perturbed_motion_clips: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which a GPU can copy while it computes. DataLoader calls it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in values.items() if isinstance(v, torch.Tensor)})


class ClipDataset(Dataset):
    """Decodes, samples and squashes one clip per key `(epoch, index)`; epochs differ only in their random draws.

    timeout_s: see `video.read_frames`. cache: where frames are kept; a sampler that draws at random cannot have one.
    known_bad: clips that are not to be tried; those that fail join them, so that each process waits for a file once.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        root: str | Path,
        sampler: Sampler,
        size: int,
        perturbation: RandomPerturbation | None = None,
        seed: int = 0,
        timeout_s: float | None = None,
        cache: FrameCache | None = None,
        known_bad: Iterable[Failure] = (),
    ):
        check_at_least(1, size=size)
        if cache is not None:
            check_cacheable(sampler)
        self.clips, self.root, self.sampler, self.size = clips, Path(root), sampler, size
        self.perturbation, self.seed = perturbation, seed
        self.timeout_s, self.cache = timeout_s, cache
        self.known_bad = {failure.index: failure for failure in known_bad}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: Key) -> Sample:
        """Raises MediaError for a file that gives no frames."""
        epoch, index = key
        clip = self.clips[index]
        generator = seeded_generator(self.seed, "clip", epoch, index)
        pixels, flags = self._frames(clip, generator)
        frames, clips = frames_and_clips(pixels, self.sampler)
        perturbed = kind = perturbed_clips = None
        if self.perturbation is not None:
            perturbed, kind = self.perturbation(frames, generator)
            if clips is not None:
                perturbed_clips = self.perturbation.same_kind(kind, clips, generator)
        return Sample(clip, frames, perturbed, kind, index, flags, (), clips, perturbed_clips)

    def first_readable(self, candidates: Iterable[Key]) -> Sample:
        """The sample of the first candidate that gives frames. Raises NoReadableClip if none does."""
        failures = []
        for key in candidates:
            _, index = key
            if index not in self.known_bad:
                try:
                    return replace(self[key], failures=tuple(failures))
                except MediaError as error:
                    self.known_bad[index] = Failure(index, self.clips[index].path, error.reason, error.detail)
            failures.append(self.known_bad[index])
        raise NoReadableClip(failures)

    def __getitems__(self, slots: list[Iterable[Key]]) -> list[Sample] | NoReadableClip:
        """What DataLoader calls for a batch. The error is returned, since a worker process would raise it as text."""
        try:
            return [self.first_readable(candidates) for candidates in slots]
        except NoReadableClip as error:
            return error

    def _frames(self, clip: Clip, generator: torch.Generator) -> tuple[torch.Tensor, frozenset[str]]:
        """All squashed pictures that the sampler chose of a clip, and its flags, from the cache where it has them."""
        if self.cache is None:
            return self._decode(clip, generator)
        try:
            key = key_of(self.root / clip.path, self.sampler, self.size)
        except OSError:
            return self._decode(clip, generator)  # says what is wrong with the file
        entry = self.cache.get(key)
        if entry is None:
            entry = self._decode(clip, generator)
            self.cache.put(key, *entry)
        return entry

    def _decode(self, clip: Clip, generator: torch.Generator) -> tuple[torch.Tensor, frozenset[str]]:
        frames = read_frames(clip.path, self.sampler, generator, self.root, self.timeout_s)
        return resize_square(frames.pixels, self.size), frames.flags


@lru_cache(maxsize=2)  # the steps that are being loaded may lie in two epochs
def epoch_order(num_clips: int, seed: int, epoch: int) -> list[int]:
    """The clips in the order of an epoch: a seeded permutation."""
    return torch.randperm(num_clips, generator=seeded_generator(seed, "order", epoch)).tolist()


@dataclass(frozen=True)
class Slot:
    """One place in a step, as its candidates `(epoch, index)`: the clip that is due, then those to stand in for it.

    They are the clips at every `stride`-th position of the epoch, cyclically from `position` on. As the stride is the
    number of videos in a step, no two slots of a step have a candidate in common.
    """

    num_clips: int
    stride: int
    seed: int
    epoch: int
    position: int

    def __iter__(self) -> Iterator[Key]:
        rounds, place = divmod(self.position, self.stride)
        candidates = epoch_order(self.num_clips, self.seed, self.epoch)[place :: self.stride]
        return ((self.epoch, index) for index in candidates[rounds:] + candidates[:rounds])


class StepBatches:
    """This rank's slots of each step from `start_step` up to `steps`.

    Every epoch is a seeded permutation of the clips, cut into steps of `videos_per_step`; the remainder that fills no
    step sits out, other clips in each epoch, or stands in. So no step crosses two epochs, and none holds a clip twice.
    Ranks take equal runs of a step, in rank order.
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

    def __iter__(self) -> Iterator[list[Slot]]:
        share = self.videos_per_step // self.world_size
        for step in range(self.start_step, self.steps):
            epoch, place = divmod(step, self.num_clips // self.videos_per_step)
            first = place * self.videos_per_step + self.rank * share
            positions = range(first, first + share)
            yield [Slot(self.num_clips, self.videos_per_step, self.seed, epoch, position) for position in positions]


def collate(samples: list[Sample] | NoReadableClip) -> Batch | NoReadableClip:
    """Stack samples to a batch; an error passes through to the process that consumes the batches."""
    if isinstance(samples, NoReadableClip):
        return samples
    kinds = [sample.perturbation for sample in samples]
    return Batch(
        clips=[sample.clip for sample in samples],
        frames=torch.stack([sample.frames for sample in samples]),
        perturbed=stacked([sample.perturbed for sample in samples]),
        perturbed_ok=torch.tensor([kind is not None for kind in kinds]),
        kinds=kinds,
        targets=torch.tensor([sample.clip.target for sample in samples], dtype=torch.float32),
        index=torch.tensor([sample.index for sample in samples]),
        flags=[sample.flags for sample in samples],
        failures=[failure for sample in samples for failure in sample.failures],
        motion_clips=stacked([sample.motion_clips for sample in samples]),
        perturbed_motion_clips=stacked([sample.perturbed_motion_clips for sample in samples]),
    )


def stacked(values: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if values[0] is None else torch.stack(values)


def raise_error(batch: Batch | NoReadableClip) -> Batch:
    if isinstance(batch, NoReadableClip):
        raise batch
    return batch


def leave_signals_to_the_parent() -> Callable[[int], None]:
    """What a worker calls first, since terminals, torchrun and schedulers send Ctrl-C and SIGTERM to all processes."""
    ending = multiprocessing.get_context("spawn").Event()
    atexit.register(ending.set)  # multiprocessing then sends SIGTERM too, and means it
    return partial(ignore_signals, ending)


def ignore_signals(ending: Event, _worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)


class ClipLoader(DataLoader):
    """Yields a Batch for each list of slots in `batches`, decoded ahead by `num_workers` processes (0: in this one).

    pin_memory: batches in page-locked memory; needs a GPU. Raises NoReadableClip, in this process and typed, in the
    place of a batch that cannot be filled. Global random state is left alone.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        batches: Iterable[list[Iterable[Key]]],
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            multiprocessing_context="spawn" if num_workers else None,  # a fork would copy threads and CUDA state
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_parent() if num_workers else None,
            generator=torch.Generator(),  # DataLoader draws a worker seed; without this, from the global stream
        )

    def __iter__(self) -> Iterator[Batch]:
        return map(raise_error, super().__iter__())  # no generator: the workers start now, not with the first batch
