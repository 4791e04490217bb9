import contextlib
import os
import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import data.video
from data.samplers import SAMPLERS, DenseClipSampler, RandomSegmentSampler, UniformSampler
from data.video import MediaError, check_readable, read_frames, resize_square


def write_video(path, frames=31, size=(64, 48), codec="libx264", pts=None, rotation=0, pix_fmt="yuv420p", **options):
    """A moving gradient under noise; x264 with B-frames and a short GOP. `pts` in milliseconds, one per frame."""
    width, height = size
    noise = np.random.default_rng(0)
    coders = {"bf": "2", "g": "12"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, pix_fmt, coders
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


def remux(sources, path, change=lambda stream, packet: None, **options):
    """Copy the first stream of each file into one file, `change` seeing every packet on its way."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(av.open(str(path), "w", options=options))
        inputs = [stack.enter_context(av.open(str(source))) for source in sources]
        streams = [target.add_stream_from_template(source.streams[0]) for source in inputs]
        for source, stream in zip(inputs, streams):
            for packet in source.demux():
                if packet.size:
                    change(stream, packet)
                    packet.stream = stream
                    target.mux(packet)
    return path


def decode_all(path, threads=0):
    """Every picture (H, W, 3) of the widest stream that decodes, and its time. Bad packets are skipped."""
    pictures, times_s = [], []
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda stream: stream.codec_context.width)
        stream.codec_context.thread_count = threads
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                pictures.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
                times_s.append(frame.time)
    return pictures, times_s


def assert_equals_full_decode(path, sampler, threads=0, seed=0):
    pictures, times_s = decode_all(path, threads)
    frames = read_frames(path, sampler, torch.Generator().manual_seed(seed))
    index = sampler(len(pictures), torch.Generator().manual_seed(seed)).tolist()
    assert frames.num_frames == len(pictures) and frames.index.tolist() == index
    assert frames.pixels.dtype == torch.uint8 and frames.pixels.is_contiguous()
    expected = np.stack([pictures[i] for i in index]).transpose(0, 3, 1, 2)
    assert np.array_equal(frames.pixels.numpy(), expected)
    if times_s[0] is not None:
        assert frames.times_s.tolist() == pytest.approx([times_s[i] - times_s[0] for i in index])
    return frames


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("file", "kwargs"),
    [
        ("b-frames.mp4", {}),
        ("one.mp4", {"frames": 1}),
        ("short.mkv", {"frames": 4}),
        ("odd.mp4", {"size": (65, 49), "pix_fmt": "yuv444p"}),
        ("mpeg2.mpg", {"codec": "mpeg2video"}),
        ("mpeg4.avi", {"codec": "mpeg4", "frames": 7}),
        ("raw.h264", {}),
    ],
)
def test_frames_are_those_of_a_full_decode(tmp_path, file, kwargs, name):
    frames = assert_equals_full_decode(write_video(tmp_path / file, **kwargs), SAMPLERS[name](6))
    assert len(frames.pixels) == 6 and not frames.truncated


def test_only_the_chosen_pictures_are_converted(tmp_path, monkeypatch):
    path, converted = write_video(tmp_path / "a.mp4"), []
    check_readable(path)
    to_rgb = data.video._to_rgb
    monkeypatch.setattr(data.video, "_to_rgb", lambda path, frame: converted.append(frame) or to_rgb(path, frame))
    read_frames(path, UniformSampler(6))
    assert len(converted) == 6


def test_times_are_real_and_start_at_zero(tmp_path):
    pts = [8330 + t for t in (0, 40, 50, 300, 301, 900, 1000, 1900)]
    path = write_video(tmp_path / "vfr.mkv", frames=8, pts=pts)
    frames = assert_equals_full_decode(path, DenseClipSampler(8))
    assert frames.times_s.tolist() == pytest.approx([(t - 8330) / 1000 for t in pts])
    assert not frames.truncated


def test_an_edit_list_hides_pictures_and_needs_no_second_pass(tmp_path, monkeypatch):
    def start_five_pictures_later(stream, packet):
        shift = int(Fraction(5, 25) / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift

    whole = write_video(tmp_path / "whole.mp4")
    path = remux([whole], tmp_path / "edited.mp4", start_five_pictures_later, avoid_negative_ts="disabled")
    passes, decode = [], data.video._decode
    monkeypatch.setattr(data.video, "_decode", lambda *args: passes.append(1) or decode(*args))
    assert assert_equals_full_decode(path, UniformSampler(6)).num_frames == 26
    assert len(passes) == 1


def test_sound_that_outlasts_the_picture_is_no_damage(tmp_path):
    parts = [write_video(tmp_path / "v.mp4"), write_audio(tmp_path / "a.mp4", seconds=3)]
    assert not assert_equals_full_decode(remux(parts, tmp_path / "both.mp4"), UniformSampler(6)).truncated


def test_no_timestamps_give_nan(tmp_path):
    assert read_frames(write_video(tmp_path / "raw.h264"), UniformSampler(3)).times_s.isnan().all()


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path, rotation):
    turned = assert_equals_full_decode(write_video(tmp_path / "r.mp4", rotation=rotation), UniformSampler(2))
    plain = read_frames(write_video(tmp_path / "p.mp4"), UniformSampler(2)).pixels
    # The file says: rotate counterclockwise. A quarter turn brings the right edge to the top.
    quarter_turns = {90: 1, 180: 2, -90: 3}[rotation]
    for _ in range(quarter_turns):
        plain = plain.transpose(-1, -2).flip(-2)
    assert torch.equal(turned.pixels, plain)


def test_rotation_by_a_part_of_a_quarter_is_ignored_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="rotation by 45 degrees is ignored"):
        tilted = read_frames(write_video(tmp_path / "r.mp4", rotation=45), UniformSampler(2))
    assert torch.equal(tilted.pixels, read_frames(write_video(tmp_path / "p.mp4"), UniformSampler(2)).pixels)


def test_a_change_of_size_is_resized_to_the_first_chosen_picture(tmp_path):
    small, large = (write_video(tmp_path / f"{w}.h264", frames=4, size=(w, h)) for w, h in [(64, 48), (128, 80)])
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    frames = read_frames(both, DenseClipSampler(8))
    assert frames.pixels.shape == (8, 3, 48, 64)
    assert torch.equal(frames.pixels[:4], read_frames(small, DenseClipSampler(4)).pixels)
    expected = bicubic(read_frames(large, DenseClipSampler(4)).pixels, 48, 64)
    assert (frames.pixels[4:].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("file", ["cut.mp4", "cut.mkv"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_file_cut_short_gives_what_decodes_and_says_so(tmp_path, file, name):
    path = write_video(tmp_path / file, **({"movflags": "faststart"} if file.endswith("mp4") else {}))
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    frames = assert_equals_full_decode(path, SAMPLERS[name](6), threads=1)
    assert frames.truncated and 0 < frames.num_frames < 31


def test_damage_in_the_middle_loses_only_what_it_hits(tmp_path):
    path = write_video(tmp_path / "hit.mp4", movflags="faststart")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    path.write_bytes(content)
    frames = assert_equals_full_decode(path, RandomSegmentSampler(6), threads=1)
    assert frames.truncated and frames.index[-1] > 20


def test_one_packet_that_does_not_decode_is_told(tmp_path):
    path = write_video(tmp_path / "hit.mp4")
    with av.open(str(path)) as container:
        *_, last = (packet for packet in container.demux() if packet.size)
        start, size = last.pos, last.size
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    frames = assert_equals_full_decode(path, UniformSampler(6))
    assert frames.truncated and frames.num_frames == 30


@pytest.mark.parametrize("name", ["with space.mp4", "50%d:é🎬.mp4", "concat:a.mp4|b.mp4", "pipe:0", "http:x"])
def test_any_file_name_is_only_a_name(tmp_path, name):
    plain = write_video(tmp_path / "plain.mp4")
    (tmp_path / name).write_bytes(plain.read_bytes())
    assert torch.equal(
        read_frames(tmp_path / name, UniformSampler(2)).pixels, read_frames(plain, UniformSampler(2)).pixels
    )


def test_metadata_that_is_not_utf8_opens(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    content = path.read_bytes()
    assert content.count(b"Lavf") == 1  # the name of the muxer, a text field
    path.write_bytes(content.replace(b"Lavf", b"\xff\xfe\xfd\xfc"))
    assert read_frames(path, UniformSampler(2)).num_frames == 31


BAD = {
    "missing": ("unreadable", lambda path: None),
    "folder": ("refused", Path.mkdir),
    "fifo": ("refused", os.mkfifo),
    "empty": ("unreadable", Path.touch),
    "text": ("unreadable", lambda path: path.write_text("not a video\n" * 99)),
    "ffconcat": ("refused", lambda path: path.write_text(f"ffconcat version 1.0\nfile {path.name}.real.mp4\n")),
    "m3u8": ("unreadable", lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nx.real.mp4\n#EXT-X-ENDLIST\n")),
    "no-moov": ("unreadable", lambda path: path.write_bytes(write_video(path).read_bytes()[:3000])),
    "audio": ("no_video_stream", write_audio),
    "blank-data": ("no_frames", lambda path: write_blank(path)),
}


def write_blank(path):
    """A good header over pictures that are all zero bytes."""
    content = bytearray(write_video(path).read_bytes())
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_a_media_error_with_its_reason(tmp_path, case):
    reason, make = BAD[case]
    write_video(tmp_path / "bad.mp4.real.mp4")  # what a playlist would reach if it were followed
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(MediaError) as caught:
        read_frames(path, UniformSampler(6))
    assert caught.value.reason == reason and caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: {reason} (")
    if reason != "no_frames":  # which only decoding tells
        with pytest.raises(MediaError) as early:
            check_readable(path)
        assert early.value.reason == reason


def test_a_codec_without_decoder_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(MediaError, match=r"unreadable \(no decoder"):
        read_frames(path, UniformSampler(6))


def test_cover_art_is_not_a_video(tmp_path):
    def as_cover(stream, packet):
        stream.disposition = av.stream.Disposition.attached_pic

    picture = write_video(tmp_path / "cover.mkv", frames=1, codec="mjpeg", pix_fmt="yuvj420p")
    remux([picture], tmp_path / "song.mp4", as_cover)
    with pytest.raises(MediaError, match="no_video_stream"):
        read_frames(tmp_path / "song.mp4", UniformSampler(6))


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    path = write_video(tmp_path / "large.mp4")
    monkeypatch.setattr(data.video, "MAX_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(data.video, "_decode", None)
    with pytest.raises(MediaError, match=r"too_large \(64 x 48 pixels"):
        read_frames(path, UniformSampler(6))


def test_a_picture_that_grows_mid_stream_is_refused(tmp_path, monkeypatch):
    small, large = (write_video(tmp_path / f"{w}.h264", frames=4, size=(w, 48)) for w in (64, 128))
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    monkeypatch.setattr(data.video, "MAX_PIXELS", 64 * 48)
    with pytest.raises(MediaError, match="too_large"):
        read_frames(both, DenseClipSampler(8))


def test_media_error_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError("refused", "a.mp4", "why")))
    assert (error.reason, error.path, error.detail, str(error)) == ("refused", "a.mp4", "why", "a.mp4: refused (why)")


def test_errors_of_the_caller_are_not_the_files(tmp_path):
    with pytest.raises(ValueError, match="needs a generator"):
        read_frames(write_video(tmp_path / "a.mp4"), RandomSegmentSampler(6))


def bicubic(pixels, height, width):
    """Antialiased bicubic (a = -0.5) as image libraries do it: rows, then columns, 8 bits after each."""

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def weights(old, new):
        scale = max(old / new, 1)
        rows = [[kernel((j + 0.5 - (i + 0.5) * old / new) / scale) for j in range(old)] for i in range(new)]
        rows = torch.tensor(rows, dtype=torch.float64)
        return rows / rows.sum(1, keepdim=True)

    wide = (pixels.double() @ weights(pixels.shape[-1], width).T).round().clamp(0, 255)
    return (weights(pixels.shape[-2], height) @ wide).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("height", "width", "size"), [(48, 64, 16), (30, 20, 40), (17, 99, 33)])
def test_resize_square_is_antialiased_bicubic(height, width, size):
    pixels = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    squared = resize_square(pixels, size)
    assert squared.shape == (3, 3, size, size) and squared.dtype == torch.uint8
    assert (squared.int() - bicubic(pixels, size, size).int()).abs().max() <= 1


def test_resize_square_leaves_a_square_of_that_size_alone():
    pixels = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(1, 3, 4, 4)
    assert resize_square(pixels, 4) is pixels


ASSETS = os.environ.get("VQA_TEST_ASSETS")
VIDEOS = sorted(Path(ASSETS, "videos").glob("*/*.*")) if ASSETS else []
VIDEOS = [path for path in VIDEOS if path.suffix in {".mp4", ".mkv", ".webm", ".avi", ".mpg"}]


@pytest.mark.skipif(not ASSETS, reason="VQA_TEST_ASSETS names no folder of real videos")
@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_real_files_equal_a_full_decode(path):
    frames = assert_equals_full_decode(path, RandomSegmentSampler(6))
    assert not frames.truncated
