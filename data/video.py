"""Video files: chosen frames of one file as RGB pixels, exactly those that decoding everything and picking would give.

Legend: F frames chosen, H and W the height and width in pixels of the upright picture, S the side of a square.

Files come from anywhere, so nothing in them is believed. Only regular files are opened, and those as file objects with
a list of allowed containers: FFmpeg alone would follow the paths and addresses that a playlist names. Frames are
counted, not read from the header. Whatever fails inside the decoder leaves as one MediaError.
"""

import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import torch
from torch.nn.functional import interpolate

from data.samplers import Sampler

MAX_PIXELS = 8192 * 4320  # in one picture; a small file can claim billions
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,ivf,mxf,nut,h264,hevc,m4v,yuv4mpegpipe,gif"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
EARLY_END_S = 0.1  # how much earlier than its container says a whole file may end

Reason = Literal["refused", "no_video_stream", "no_frames", "unreadable", "too_large"]


class MediaError(Exception):
    """A video that gives no frames: `reason` is one of Reason, `path` the file, `detail` a few words for people."""

    def __init__(self, reason: Reason, path: str, detail: str):
        super().__init__(reason, path, detail)  # all three, so that the error survives pickling between processes
        self.reason, self.path, self.detail = reason, path, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.detail})"


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames chosen from one video.

    pixels: uint8 (F, 3, H, W), RGB, turned upright. index: int64 (F,), places among the pictures of the file, 0 first.
    times_s: float64 (F,), seconds since the first picture, NaN where the file has no timestamps.
    num_frames: how many pictures the file gave. truncated: it is damaged (it ends before it should, or parts of it
    would not decode) and the frames come from what is left.
    """

    pixels: torch.Tensor
    index: torch.Tensor
    times_s: torch.Tensor
    num_frames: int
    truncated: bool


def read_frames(path: str | Path, sampler: Sampler, generator: torch.Generator | None = None) -> Frames:
    """Decode the frames of `path` that `sampler(num_frames, generator)` asks for; memory holds F pictures at a time.

    Raises MediaError: `refused` (not a regular file, not a known container), `no_video_stream`, `no_frames` (none
    decodes), `too_large` (a picture above MAX_PIXELS), `unreadable` (missing, or anything else that went wrong).
    """
    path = Path(path)
    state = None if generator is None else generator.get_state()
    num_frames, ends_early = _count_packets(path)
    # A packet nearly always holds one picture. Where it does not, the first pass through the decoder tells the true
    # count and the second one picks with it, drawing the same random numbers.
    for _ in range(2):
        if num_frames == 0:
            raise MediaError("no_frames", str(path), "no picture in it decodes")
        if generator is not None:
            generator.set_state(state)
        index = sampler(num_frames, generator)
        pictures, times_s, decoded, errors = _decode(path, set(index.tolist()))
        if decoded == num_frames:
            break
        num_frames = decoded
    else:
        raise MediaError("unreadable", str(path), "two passes gave different numbers of pictures")

    size = pictures[int(index[0])].shape[-2:]
    pixels = torch.cat([_resize(pictures[k], size) for k in index.tolist()])
    times = torch.tensor([times_s[k] for k in index.tolist()], dtype=torch.float64)
    return Frames(pixels, index, times, num_frames, truncated=ends_early or errors)


def check_readable(path: str | Path) -> None:
    """Raise the MediaError of a file that can be told from its header alone: cheap enough to ask of every clip."""
    with _open_video(Path(path)):
        pass


def resize_square(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Squash uint8 (F, 3, H, W) to (F, 3, size, size), bicubic as in the released code, with antialiasing."""
    return _resize(pixels, (size, size))


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if pixels.shape[-2:] == tuple(size):
        return pixels
    # On uint8 this is the exact integer filter of image libraries: no float copy of the frames, no overshoot to clip.
    return interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its best video stream. Whatever fails inside the `with` block leaves it as a MediaError."""
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would wait for its writer for ever
            raise MediaError("refused", str(path), "not a regular file")
        with open(path, "rb") as file, av.open(file, options=OPTIONS, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise MediaError("no_video_stream", str(path), "no moving picture in it")
            context = stream.codec_context
            if context is None:
                raise MediaError("unreadable", str(path), "no decoder for its codec")
            _check_size(path, context.width, context.height)
            context.thread_count = 1  # clips are the unit of parallel work, and damaged ones decode the same every time
            yield container, stream
    except MediaError:
        raise
    except av.ArgumentError as error:
        raise MediaError("refused", str(path), "not a video container that is read here") from error
    except Exception as error:  # PyAV lets many kinds through, UnicodeDecodeError and MemoryError among them
        raise MediaError("unreadable", str(path), f"{type(error).__name__}: {error}") from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError("too_large", str(path), f"{width} x {height} pixels, at most {MAX_PIXELS} in all are read")


def _count_packets(path: Path) -> tuple[int, bool]:
    """How many packets of the file hold a picture to show, and whether the file ends earlier than its header says."""
    count, end_s = 0, 0.0
    with _open_video(path) as (container, stream):
        for packet in container.demux():  # of every stream, since the longest one sets the duration
            if packet.size and packet.stream is stream:
                count += not packet.is_discard
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        expected_s = (container.duration or 0) / av.time_base
    return count, end_s < expected_s - EARLY_END_S


def _decode(path: Path, wanted: Container[int]) -> tuple[dict[int, torch.Tensor], dict[int, float], int, bool]:
    """Decode all, keep the wanted: pictures (1, 3, H, W) and times by index, the number decoded, whether any failed."""
    pictures, times_s, count, errors = {}, {}, 0, False
    start_s = float("nan")
    with _open_video(path) as (container, stream):
        for packet in container.demux(stream):
            errors |= packet.is_corrupt
            try:
                frames = packet.decode()
            except av.error.FFmpegError:  # this packet only: the next one may be whole
                errors, frames = True, []
            for frame in frames:
                errors |= frame.is_corrupt
                if count == 0 and frame.time is not None:
                    start_s = frame.time
                if count in wanted:
                    pictures[count] = _to_rgb(path, frame)
                    times_s[count] = float("nan") if frame.time is None else frame.time - start_s
                count += 1
    return pictures, times_s, count, errors


def _to_rgb(path: Path, frame: av.VideoFrame) -> torch.Tensor:
    """One decoded picture as uint8 (1, 3, H, W), turned as the file's metadata says it is to be shown."""
    _check_size(path, frame.width, frame.height)
    turns, odd = divmod(frame.rotation, 90)
    if odd:
        warnings.warn(f"{path}: rotation by {frame.rotation} degrees is ignored", stacklevel=2)
        turns = 0
    # One conversion thread: starting more costs four times the work itself.
    rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))
    return torch.rot90(rgb, turns).permute(2, 0, 1)[None]
