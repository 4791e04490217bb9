"""Decoded frames kept on disk, so that a clip is decoded once and not once an epoch.

Legend: F frames, S side in pixels.

An entry is a safetensors file named by the hash of its key. It is written under a temporary name and then renamed, so
processes may share a folder, and any file in it may be deleted at any time.
"""

import hashlib
import os
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.samplers import Sampler


def key_of(path: str | Path, sampler: Sampler, size: int) -> str:
    """What the frames of a clip depend on: the file (its resolved path, bytes and time of change), sampler and side.

    Raises OSError when there is no such file.
    """
    path = Path(path).resolve()
    stat = path.stat()
    return repr((str(path), stat.st_size, stat.st_mtime_ns, sampler, size))


def check_cacheable(sampler: Sampler) -> None:
    """Raise a ValueError naming --frame-cache for a sampler that does not pick the same frames each time."""
    if sampler.random:
        raise ValueError(f"--frame-cache keeps the same frames for every epoch, and {sampler} draws new ones")


class FrameCache:
    """Frames uint8 (F, 3, S, S) and the flags of their file, by key, in `folder`: at most `limit_bytes` in all.

    A full cache adds nothing more. Clips come round in a new random order every epoch, so dropping an old entry for a
    new one would lose exactly as many hits as it wins. Processes that share a folder may exceed the limit by an entry
    each. Raises ValueError naming --frame-cache if the folder cannot be made.
    """

    def __init__(self, folder: str | Path, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._adds = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--frame-cache {folder}: {error.strerror}") from error

    def get(self, key: str) -> tuple[torch.Tensor, frozenset[str]] | None:
        """The frames and flags put under `key`; None if there are none, or only a damaged or foreign file."""
        try:
            with safe_open(self._file(key), "pt") as entry:
                pixels, metadata = entry.get_tensor("pixels"), entry.metadata() or {}
        except (OSError, SafetensorError):
            return None
        if metadata.get("key") != key or metadata.get("crc32") != _crc32(pixels):
            return None
        return pixels, frozenset(metadata["flags"].split())

    def put(self, key: str, pixels: torch.Tensor, flags: frozenset[str]) -> None:
        """Keep frames, if there is room. If the disk does not take them, warn, and keep nothing from then on."""
        if not self._adds:
            return
        pixels = pixels.contiguous()
        metadata = {"key": key, "crc32": _crc32(pixels), "flags": " ".join(sorted(flags))}
        entry = save({"pixels": pixels}, metadata)
        temporary = self.folder / f"{uuid4().hex}.tmp"
        try:
            self._adds = self._bytes() + len(entry) <= self.limit_bytes
            if self._adds:
                temporary.write_bytes(entry)
                os.replace(temporary, self._file(key))
        except OSError as error:
            self._adds = False
            warnings.warn(f"--frame-cache {self.folder}: {error.strerror}; no more frames are kept", stacklevel=2)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _bytes(self) -> int:
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has just renamed it
                    total += entry.stat().st_size
        return total


def _crc32(pixels: torch.Tensor) -> str:
    return f"{zlib.crc32(pixels.numpy()):08x}"
