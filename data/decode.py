"""Chosen pictures of one video file, exactly those that decoding everything and picking would give. Needs no torch.

Legend: F pictures chosen, H and W the height and width in pixels of the upright picture.

Files come from anywhere, so nothing in them is believed. Only regular files are opened, and those as file objects with
a list of allowed containers: FFmpeg alone would follow the paths and addresses that a playlist names. Whatever fails
inside the decoder leaves as one MediaError.

A pass over the packets, without decoding, tells how many pictures there are and when each is shown. Then the decoder
visits only the stretches between a keyframe and the last chosen picture behind it, and passes over pictures there that
no other is built on. What that relies on is checked on the way; where it does not hold, all is decoded and counted.
"""

import math
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np

MAX_PIXELS = 8192 * 4320  # in one picture; a small file can claim billions
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,ivf,mxf,nut,h264,hevc,m4v,yuv4mpegpipe,gif"
# The last is for the decoders that look into a file while it is opened.
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "", "max_pixels": str(MAX_PIXELS)}
EARLY_END_S = 0.1  # how much earlier than its container says a whole file may end

# Containers and codecs in which every packet is one picture with a time of its own. Elsewhere a packet may be a field,
# two pictures or none, and the pictures have to be counted by decoding.
INDEXED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
INDEXED_CODECS = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "prores"}
# Codecs whose decoders can pass over a picture that no other is built on. In VP8 and VP9 even such a picture may leave
# something behind (a segmentation map, probabilities), and the decoder of AV1 is told only once what to pass over.
SKIPPING_CODECS = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"}
CUT_MP4 = "an MP4 that ends before its index does"
HDR_TRANSFERS = {16, 18}  # PQ (SMPTE 2084) and HLG (ARIB STD-B67), as numbered in ITU-T H.273

Reason = Literal[
    "missing",
    "refused",
    "no_video_stream",
    "no_frames",
    "truncated",
    "encrypted",
    "too_large",
    "unreadable",
    "timeout",
    "crashed",
]
Choose = Callable[[np.ndarray], np.ndarray]
Spot = tuple[np.ndarray, int, frozenset[str]]  # RGB as stored, quarter turns, flags


class MediaError(Exception):
    """A video that gives no frames: `reason` is one of Reason, `path` the file, `detail` a few words for people."""

    def __init__(self, reason: Reason, path: str, detail: str):
        super().__init__(reason, path, detail)  # all three, so that the error survives pickling between processes
        self.reason, self.path, self.detail = reason, path, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.detail})"


@dataclass(frozen=True, eq=False)
class Picked:
    """The pictures chosen from one file.

    pictures: by number, uint8 (H, W, 3), RGB, upright; each once, however often it is chosen. index: int64 (F,), the
    numbers chosen, 0 the first picture of the file. times_s: float64 (F,), seconds since the first picture, NaN where
    the file has no timestamps. num_frames: how many pictures the file has. flags: 'truncated' (damaged: it ends before
    it should, or parts of it do not decode, and the pictures come from what is left), 'hdr' (PQ or HLG, shown as if it
    were not), 'rotation_ignored' (not by quarter turns).
    """

    pictures: dict[int, np.ndarray]
    index: np.ndarray
    times_s: np.ndarray
    num_frames: int
    flags: frozenset[str]


def pick(path: str, choose: Choose) -> Picked:
    """Decode the pictures that `choose` asks for; memory holds those, one more, and three numbers a picture.

    choose: the times of all pictures in seconds since the first, float64 (num_frames,), NaN where there are none, to
    the numbers wanted, int64 (F,). It is asked again if the file turns out to have other pictures than its packets
    promise.

    Raises MediaError: `missing`; `refused` (not a regular file, or a container not read here); `no_video_stream`;
    `no_frames` (none decodes); `truncated` (cut before its index); `encrypted`; `too_large` (above MAX_PIXELS);
    `unreadable` (anything else that went wrong).
    """
    with ExitStack() as stack:
        with _media_errors(path):
            container, stream = stack.enter_context(_open_video(path))
            packets = _scan(path, container, stream)
        times_s = packets.times_s
        if packets.indexed:
            index = choose(times_s)  # outside of _media_errors: its mistakes are the caller's, not the file's
            with _media_errors(path), suppress(_NotAsIndexed):
                spots = _decode_stretches(path, container, stream, packets, sorted(set(index.tolist())))
                return _picked(spots, index, times_s, damaged=False)

    for _ in range(2):  # with what the packets promise; if that was wrong, with what the decoder gave
        if len(times_s) == 0:
            raise MediaError("no_frames", path, "no picture in it decodes")
        index = choose(times_s)
        spots, decoded_s, damaged = _decode_all(path, set(index.tolist()))
        if np.array_equal(decoded_s, times_s, equal_nan=True):
            return _picked(spots, index, times_s, damaged or packets.damaged)
        times_s = decoded_s
    raise MediaError("unreadable", path, "two passes gave different pictures")


def check_readable(path: str | Path) -> None:
    """Raise the MediaError of a file that can be told from its header alone: cheap enough to ask of every clip."""
    with _media_errors(str(path)), _open_video(str(path)):
        pass


class _NotAsIndexed(Exception):
    """The decoder gave something other than the packets promised."""


@dataclass(frozen=True, eq=False)
class _Packets:
    """The packets of a video stream in the order of the file.

    pts: presentation times in units of the stream's time base; is_key; shown: positions of the packets whose picture
    is shown, in the order of presentation. damaged: the file ends early or has broken packets. indexed: packets and
    pictures correspond one to one, so pictures may be found without decoding all.
    """

    pts: list[int | None]
    is_key: list[bool]
    shown: list[int]
    times_s: np.ndarray
    damaged: bool
    indexed: bool


def _scan(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> _Packets:
    pts, is_key, shown, ends, corrupt = [], [], [], {}, False
    codec = stream.codec_context.codec.canonical_name
    for packet in container.demux():  # of every stream, since the longest one sets the duration
        if packet.pts is not None:
            end = packet.pts + (packet.duration or 0)
            ends[packet.stream] = max(end, ends.get(packet.stream, end))
        if packet.size and packet.stream is stream:
            if not pts and packet.has_sidedata("encryption_info"):
                raise MediaError("encrypted", path, "it needs a key")
            hidden = packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10)  # RFC 6386, 9.1: show_frame
            if not hidden:
                shown.append(len(pts))
            pts.append(packet.pts)
            is_key.append(packet.is_keyframe)
            corrupt |= packet.is_corrupt
    end_s = max((float(end * at.time_base) for at, end in ends.items()), default=0.0)
    damaged = corrupt or end_s < (container.duration or 0) / av.time_base - EARLY_END_S

    timed = None not in pts
    indexed = (
        timed
        and not damaged
        and container.format.name in INDEXED_CONTAINERS
        and codec in INDEXED_CODECS
        and bool(shown)
        and len(set(pts)) == len(pts)
        and is_key[0]
        and min(pts) == pts[0]  # else pictures lean on a keyframe that is not in the file
    )
    if timed:
        shown.sort(key=pts.__getitem__)
    return _Packets(pts, is_key, shown, _seconds([pts[i] for i in shown], stream.time_base), damaged, indexed)


def _seconds(pts: list[int | None], time_base: Fraction) -> np.ndarray:
    """Presentation times in seconds since the first; NaN for those that are unknown, for all if the first is."""
    start = math.nan if not pts or pts[0] is None else pts[0]
    since = np.array([math.nan if p is None else p - start for p in pts], np.float64)
    return since * time_base.numerator / time_base.denominator


def _decode_stretches(
    path: str,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: _Packets,
    numbers: list[int],
) -> dict[int, Spot]:
    """The pictures `numbers`, ascending. Packets from the keyframe before a picture up to its own are all it needs."""
    keys = [i for i, key in enumerate(packets.is_key) if key]
    place = {pts: i for i, pts in enumerate(packets.pts)}
    shown = set(packets.shown)

    def keyframe_before(number: int) -> int:
        """The last keyframe that neither lies nor is shown behind the picture (pictures of an open GOP are)."""
        at = packets.shown[number]
        k = bisect_right(keys, at) - 1
        while packets.pts[keys[k]] > packets.pts[at]:
            k -= 1
        return keys[k]

    found = {}
    for start, run in groupby(numbers, keyframe_before):
        wanted = {packets.pts[packets.shown[number]]: number for number in run}
        last = max(place[pts] for pts in wanted)
        keyframe_seen = start not in shown
        for frame in _decode_run(container, stream, packets, place, start, last, wanted.keys()):
            keyframe_seen |= frame.pts == packets.pts[start] and frame.key_frame
            if frame.is_corrupt:
                raise _NotAsIndexed("a picture is damaged")
            if frame.pts in wanted:
                found[wanted[frame.pts]] = _spot(path, frame)
        if not keyframe_seen:
            raise _NotAsIndexed("the container calls a picture a keyframe that is none")
    if found.keys() != set(numbers):
        raise _NotAsIndexed("a picture did not come out")
    return found


def _decode_run(container, stream, packets, place, start, last, wanted) -> Iterator[av.VideoFrame]:
    """Decode from keyframe `start` to `last`, passing over pictures that are neither wanted nor referred to."""
    context = stream.codec_context
    passed_over = "NONREF" if context.codec.canonical_name in SKIPPING_CODECS else "DEFAULT"
    expected = start
    try:
        container.seek(packets.pts[start], stream=stream)
        for packet in container.demux(stream):
            at = place.get(packet.pts, -1)
            if packet.size and expected == start and at < start:
                continue  # the container found an earlier keyframe
            if at != expected:
                raise _NotAsIndexed("seeking went elsewhere")
            context.skip_frame = "DEFAULT" if packet.pts in wanted else passed_over
            yield from packet.decode()
            if at == last:
                break
            expected += 1
        yield from context.decode(None)  # what the decoder held back to put pictures in order
    except av.error.FFmpegError as error:
        raise _NotAsIndexed(str(error)) from error


def _decode_all(path: str, wanted: set[int]) -> tuple[dict[int, Spot], np.ndarray, bool]:
    """Decode everything, keep the wanted: pictures by number, the times of all, whether anything was damaged."""
    found, pts, damaged = {}, [], False
    with _media_errors(path), _open_video(path) as (container, stream):
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:  # this packet only: the next one may be whole
                damaged, frames = True, []
                _check_refused_size(path, stream.codec_context, error)
            for frame in frames:
                damaged |= frame.is_corrupt
                if len(pts) in wanted:
                    found[len(pts)] = _spot(path, frame)
                pts.append(frame.pts)
        return found, _seconds(pts, stream.time_base), damaged


def _picked(spots: dict[int, Spot], index: np.ndarray, times_s: np.ndarray, damaged: bool) -> Picked:
    flags = frozenset({"truncated"} if damaged else ()).union(*(flags for _, _, flags in spots.values()))
    pictures = {number: np.rot90(rgb, turns) for number, (rgb, turns, _) in spots.items()}
    return Picked(pictures, index, times_s[index], len(times_s), flags)


def _spot(path: str, frame: av.VideoFrame) -> Spot:
    """A decoded picture as RGB uint8, the quarter turns counterclockwise that make it upright, and its flags."""
    _check_size(path, frame.width, frame.height)
    turns, odd = divmod(frame.rotation, 90)
    flags = {"hdr": frame.color_trc in HDR_TRANSFERS, "rotation_ignored": odd != 0}
    return _to_rgb(frame), 0 if odd else turns, frozenset(flag for flag, is_so in flags.items() if is_so)


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8 by FFmpeg's own scale filter, which knows where chroma samples lie; PyAV's reformatter does not.

    Matrix and range are those that the file states; without a matrix BT.601, without a range the limited one.
    """
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    scale, to_rgb, sink = graph.add("scale", "flags=bicubic"), graph.add("format", "rgb24"), graph.add("buffersink")
    graph.link_nodes(source, scale, to_rgb, sink).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


@contextmanager
def _media_errors(path: str) -> Iterator[None]:
    """Whatever fails inside, however PyAV names it (UnicodeDecodeError, MemoryError ...), leaves as a MediaError."""
    try:
        yield
    except (MediaError, _NotAsIndexed):
        raise
    except FileNotFoundError as error:
        raise MediaError("missing", path, "no such file") from error
    except av.ArgumentError as error:
        raise MediaError("refused", path, "not a video container that is read here") from error
    except Exception as error:
        raise MediaError("unreadable", path, f"{type(error).__name__}: {error}") from error


@contextmanager
def _open_video(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its best video stream."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for its writer for ever
        raise MediaError("refused", path, "not a regular file")
    with open(path, "rb") as file:
        try:
            opened = av.open(file, options=OPTIONS, metadata_errors="replace")
        except av.error.InvalidDataError as error:
            if _is_cut_mp4(file):
                raise MediaError("truncated", path, CUT_MP4) from error
            raise
        with opened as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                if _is_cut_mp4(file):
                    raise MediaError("truncated", path, CUT_MP4)
                raise MediaError("no_video_stream", path, "no moving picture in it")
            context = stream.codec_context
            if context is None:
                raise MediaError("unreadable", path, "no decoder for its codec")
            _check_size(path, context.width, context.height)
            context.options = {"max_pixels": str(MAX_PIXELS)}  # a size in mid-stream is refused before memory is taken
            context.thread_count = 1  # clips are the unit of parallel work, and damaged ones decode the same every time
            yield container, stream


def _check_size(path: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError("too_large", path, f"{width} x {height} pixels, at most {MAX_PIXELS} in all are read")


def _check_refused_size(path: str, context: av.VideoCodecContext, error: av.error.FFmpegError) -> None:
    """A decoder that refuses a size shows it; or it shows none and finds its argument invalid."""
    _check_size(path, context.width, context.height)
    if context.width == 0 and isinstance(error, av.ArgumentError):
        raise MediaError("too_large", path, "the decoder refuses the size of a picture") from error


def _is_cut_mp4(file: BinaryIO) -> bool:
    """Whether the file is an MP4 whose top-level boxes lack the index, or stop short in it."""
    end, at, kinds = file.seek(0, os.SEEK_END), 0, []
    while at + 8 <= end:
        file.seek(at)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        kinds.append(kind)
        if size == 1:
            size = int.from_bytes(header[8:], "big")
        if size < 8:  # 0: up to the end of the file
            break
        at += size
    return kinds[:1] == [b"ftyp"] and (b"moov" not in kinds or (kinds[-1] == b"moov" and at > end))
