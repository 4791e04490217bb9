"""Clips for tests, and the slow and plain way to read them: decode everything, then pick."""

import contextlib
import itertools
import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from data.decode import _to_rgb
from data.video import read_frames

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(not FFMPEG, reason="no ffmpeg program to compare with")


def write_video(
    path,
    frames=31,
    size=(64, 48),
    codec="libx264",
    coder=None,
    pts=None,
    rotation=0,
    pix_fmt="yuv420p",
    colour=None,
    **options,
):
    """A moving gradient under noise; x264 with B-frames and a short GOP.

    coder: options of the encoder. pts: in milliseconds, one per frame. colour: attributes of the codec context, such as
    `colorspace`. options: of the container.
    """
    width, height = size
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = ({"bf": "2", "g": "12"} if codec == "libx264" else {}) | (coder or {})
        stream.codec_context.thread_count = 1
        for name, value in (colour or {}).items():
            setattr(stream.codec_context, name, value)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            ramp = np.add.outer(np.arange(height) * 2, np.arange(width) * 3)[..., None] + [7 * i, 3 * i, 90]
            picture = (ramp + noise.integers(0, 40, (height, width, 3))) % 256
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path, seconds=1):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = np.zeros((1, 8000 * seconds), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(sources, path, change=lambda stream, packet: None, dispositions=(), **options):
    """Copy the first stream of each file into one file, `change` seeing every packet on its way; False drops it.

    dispositions: of the streams, by number.
    """
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(av.open(str(path), "w", options=options))
        inputs = [stack.enter_context(av.open(str(source))) for source in sources]
        streams = [target.add_stream_from_template(source.streams[0]) for source in inputs]
        for number, disposition in dict(dispositions).items():
            streams[number].disposition = disposition
        for source, stream in zip(inputs, streams):
            for packet in source.demux():
                if packet.size and change(stream, packet) is not False:
                    packet.stream = stream
                    target.mux(packet)
    return path


def repeat(source, path, times):
    """The packets of a clip that starts with a keyframe, `times` times over: a long clip without encoding one."""
    with av.open(str(source)) as clip:
        packets = [packet for packet in clip.demux() if packet.size]
        length = sum(packet.duration for packet in packets)
        with av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(clip.streams[0])
            for offset, packet in itertools.product(range(0, times * length, length), packets):
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts, copy.duration = packet.pts + offset, packet.dts + offset, packet.duration
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                target.mux(copy)
    return path


def best_stream(container):
    return max(container.streams.video, key=lambda stream: stream.codec_context.width)


def decode_all(path, threads=0):
    """Every picture (H, W, 3) of the widest stream that decodes, and its time, a Fraction. Bad packets are skipped."""
    pictures, times_s = [], []
    with av.open(str(path), metadata_errors="replace") as container:
        stream = best_stream(container)
        stream.codec_context.thread_count = threads
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                turns, odd = divmod(frame.rotation, 90)
                pictures.append(np.rot90(_to_rgb(frame), 0 if odd else turns))
                times_s.append(None if frame.pts is None else frame.pts * frame.time_base)
    return pictures, times_s


def assert_picks(path, sampler, full, seed=0):
    """`read_frames` gives, bit by bit, what picking from `full`, the result of decode_all, gives."""
    pictures, times_s = full
    seconds = [float("nan") if None in (time, times_s[0]) else float(time - times_s[0]) for time in times_s]
    known = torch.tensor(seconds, dtype=torch.float64) if sampler.by_time else len(pictures)
    index = sampler(known, torch.Generator().manual_seed(seed)).tolist()
    frames = read_frames(path, sampler, torch.Generator().manual_seed(seed))
    assert frames.num_frames == len(pictures) and frames.index.tolist() == index
    assert frames.pixels.dtype == torch.uint8 and frames.pixels.is_contiguous()
    assert np.array_equal(frames.pixels.numpy(), np.stack([pictures[i] for i in index]).transpose(0, 3, 1, 2))
    assert np.array_equal(frames.times_s.numpy(), [seconds[i] for i in index], equal_nan=True)
    return frames


def by_ffmpeg(path):
    """The first picture of the widest stream as the ffmpeg program converts it, not turned."""
    with av.open(str(path)) as container:
        stream = best_stream(container)
        index, (frame, *_) = stream.index, container.decode(stream)
    source = ["-noautorotate", "-i", str(path), "-map", f"0:{index}", "-fps_mode", "passthrough", "-frames:v", "1"]
    command = [FFMPEG, "-v", "error", *source, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(frame.height, frame.width, 3)


def patch(path, at, new):
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def packet_spans(path):
    """Where each packet of the first stream lies in the file: (start, size)."""
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(container.streams[0]) if packet.size]
    return [(content.index(packet), len(packet)) for packet in packets]


def claim_size(stream, width, height):
    """A raw h264 (baseline), hevc or mpeg2 stream with one header, made to say another size; the rest stays."""
    if stream[:4] == b"\0\0\1\xb3":  # 12 bits of each in the sequence header, two more in its extension
        low, at = (width % 4096) << 12 | height % 4096, stream.index(b"\0\0\1\xb5") + 4
        extension = int.from_bytes(stream[at : at + 4], "big") | (width // 4096) << 15 | (height // 4096) << 13
        return stream[:4] + low.to_bytes(3, "big") + stream[7:at] + extension.to_bytes(4, "big") + stream[at + 4 :]

    units = stream.split(b"\0\0\1")
    (place,) = (k for k, unit in enumerate(units) if unit and (unit[0] & 31 == 7 or unit[0] == 0x42))
    hevc = units[place][0] == 0x42
    bits = "".join(f"{byte:08b}" for byte in units[place].replace(b"\0\0\3", b"\0\0").rstrip(b"\0"))

    def behind(at, numbers):
        """Where so many Exp-Golomb numbers end."""
        for _ in range(numbers):
            at += 2 * (bits.index("1", at) - at) + 1
        return at

    # Before the size: the profile, then 2 numbers; or the profile, 4 numbers (without B-frames) and a flag.
    start = behind(16 + 8 + 96, 2) if hevc else behind(32, 4) + 1
    sizes = (width, height) if hevc else (width // 16 - 1, height // 16 - 1)
    codes = (f"{size + 1:b}" for size in sizes)
    bits = bits[:start] + "".join("0" * (len(code) - 1) + code for code in codes) + bits[behind(start, 2) :]
    bits = bits[: bits.rindex("1") + 1]
    bits += "0" * (-len(bits) % 8)
    units[place] = bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)).replace(b"\0\0", b"\0\0\3")
    return b"\0\0\1".join(units)
