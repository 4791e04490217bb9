"""Video files decoded ahead of who looks at them, in order.

Threads are enough for that: each waits for a decoder process of its own (data.isolated), which imports no torch and so
starts in a fifth of a second, and stays for the next files.

Legend: F frames chosen, S side in pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import torch

from data.isolated import Decoder, decoders
from data.samplers import Sampler
from data.video import MediaError, read_frames, resize_square


@dataclass(frozen=True, eq=False)
class ReadFile:
    """What became of one file: `pixels` uint8 (F, 3, S, S) and flags (see `data.video.Frames`), or the MediaError's
    `reason` and None.
    """

    path: str
    pixels: torch.Tensor | None
    flags: frozenset[str] = frozenset()
    reason: str = ""


def read_ahead(
    paths: Iterable[str],
    sampler: Sampler,
    side: int,
    timeout_s: float,
    workers: int,
    ahead: int,
    root: str | Path | None = None,
) -> Iterator[ReadFile]:
    """The frames that `sampler` chooses of each file, squashed to `side`; a ReadFile for each path, in their order.

    timeout_s: seconds that decoding one file may take. workers: files decoded at a time. ahead: files that may wait to
    be looked at. root: as for `read_frames`. To stop early, close the iterator: it waits for the files that are being
    decoded.
    """
    free: SimpleQueue[Decoder] = SimpleQueue()
    for decoder in decoders(workers):
        free.put(decoder)

    def read(path: str) -> ReadFile:
        decoder = free.get()
        try:
            frames = read_frames(path, sampler, root=root, timeout_s=timeout_s, decoder=decoder)
            return ReadFile(path, resize_square(frames.pixels, side), frames.flags)
        except MediaError as error:
            return ReadFile(path, None, reason=error.reason)
        finally:
            free.put(decoder)

    pool, left = ThreadPoolExecutor(workers), iter(paths)
    try:
        waiting: deque[Future[ReadFile]] = deque(pool.submit(read, path) for path in islice(left, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(read, path) for path in islice(left, 1))
    finally:
        pool.shutdown(cancel_futures=True)
