"""Video files as tensors: the frames that a sampler chooses, resized where they differ in size.

Legend: F frames chosen, H and W the height and width in pixels of the upright picture, S the side of a square.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from torch.nn.functional import interpolate

from data import decode, isolated
from data.decode import MediaError, check_readable
from data.isolated import Decoder
from data.samplers import Sampler

__all__ = ["Frames", "MediaError", "check_readable", "read_frames", "resize_square"]

WARNINGS = {
    "hdr": "HDR (PQ or HLG) is shown without tone mapping: its colours are dull",
    "rotation_ignored": "it is to be shown turned by a part of a quarter; that is ignored",
}


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames chosen from one video.

    pixels: uint8 (F, 3, H, W), RGB, turned upright. index: int64 (F,), places among the pictures of the file, 0 first.
    times_s: float64 (F,), seconds since the first picture, NaN where the file has no timestamps.
    num_frames: how many pictures the file has. flags: what is unusual about it, see `data.decode.Picked`; and
    'resized': the chosen pictures differ in size, and have that of the first here.
    """

    pixels: torch.Tensor
    index: torch.Tensor
    times_s: torch.Tensor
    num_frames: int
    flags: frozenset[str]


def read_frames(
    path: str | Path,
    sampler: Sampler,
    generator: torch.Generator | None = None,
    root: str | Path | None = None,
    timeout_s: float | None = None,
    decoder: Decoder | None = None,
) -> Frames:
    """Decode the frames of `path` that `sampler` asks for, in its order; memory holds F pictures at a time.

    root: the folder that `path` starts from and may not lead out of. (Links in the folder are its owner's, and are
    followed.) timeout_s: decode in another process, which may hang or crash, for so many seconds at most: that of
    `decoder`, by default this process's first.

    Raises MediaError for a fault of the file, see `data.decode.pick`; with `root`, `refused` for a path that is
    absolute or has '..'; with `timeout_s`, `timeout` and `crashed`; `unreadable` if a sampler by time meets a file
    whose times are unknown or do not ascend.
    """
    if root is not None:
        if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
            raise MediaError("refused", str(path), f"leads out of {root}")
        path = Path(root) / path
    path = str(path)
    state = None if generator is None else generator.get_state()

    def choose(times_s: np.ndarray) -> np.ndarray:
        if generator is not None:
            generator.set_state(state)  # asked again about a damaged file, it draws the same numbers
        if not sampler.by_time:
            return sampler(len(times_s), generator).numpy()
        if np.isnan(times_s).any() or (np.diff(times_s) < 0).any():
            raise MediaError("unreadable", path, "no timestamps, or none in order; use a sampler that goes by index")
        return sampler(torch.from_numpy(times_s), generator).numpy()

    isolated_pick = isolated.pick if decoder is None else decoder.pick
    picked = decode.pick(path, choose) if timeout_s is None else isolated_pick(path, choose, timeout_s)
    for flag in picked.flags & WARNINGS.keys():
        warnings.warn(f"{path}: {WARNINGS[flag]}", stacklevel=2)
    upright = (np.ascontiguousarray(picked.pictures[k]) for k in picked.index.tolist())
    pictures = [torch.from_numpy(rgb).permute(2, 0, 1)[None] for rgb in upright]
    size = pictures[0].shape[-2:]
    resized = frozenset({"resized"} if any(picture.shape[-2:] != size for picture in pictures) else ())
    return Frames(
        pixels=torch.cat([_resize(picture, size) for picture in pictures]),
        index=torch.from_numpy(picked.index),
        times_s=torch.from_numpy(picked.times_s),
        num_frames=picked.num_frames,
        flags=picked.flags | resized,
    )


def resize_square(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Squash uint8 (F, 3, H, W) to (F, 3, size, size), bicubic as in the released code, with antialiasing."""
    return _resize(pixels, (size, size))


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if pixels.shape[-2:] == tuple(size):
        return pixels
    # On uint8 this is the exact integer filter of image libraries: no float copy of the frames, no overshoot to clip.
    return interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)
