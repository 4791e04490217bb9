"""Exactly the pictures of a full decode, from every kind of file; from every bad one a failure with a name."""

import os
import pickle
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from data import decode
from data.decode import MediaError, check_readable, pick
from data.samplers import SAMPLERS, DenseClipSampler, RandomSegmentSampler, UniformSampler, UniformTimeSampler
from data.video import read_frames
from tests.media import (
    assert_picks,
    by_ffmpeg,
    claim_size,
    decode_all,
    needs_ffmpeg,
    packet_spans,
    patch,
    remux,
    repeat,
    write_audio,
    write_video,
)

ROOT = Path(__file__).resolve().parents[1]
ASSETS = os.environ.get("VQA_TEST_ASSETS")
VIDEOS = sorted(Path(ASSETS, "videos").glob("*/*.*")) if ASSETS else []
VIDEOS = [path for path in VIDEOS if path.suffix in {".mp4", ".mkv", ".webm", ".avi", ".mpg"}]
needs_assets = pytest.mark.skipif(not ASSETS, reason="VQA_TEST_ASSETS names no folder of real videos")


@pytest.fixture
def full_decodes(monkeypatch):
    """A list that grows whenever all of a file is decoded."""
    calls, decode_everything = [], decode._decode_all
    monkeypatch.setattr(decode, "_decode_all", lambda *args: calls.append(args) or decode_everything(*args))
    return calls


def has_encoder(name):
    try:
        return bool(av.Codec(name, "w"))
    except av.codec.codec.UnknownCodecError:
        return False


def x264(**params):
    """Fixed picture types, so that a clip is built as its name says."""
    params = {"scenecut": 0, "b-adapt": 0} | {name.replace("_", "-"): value for name, value in params.items()}
    return {"coder": {"x264-params": ":".join(f"{name}={value}" for name, value in params.items())}}


def x265(**params):
    params = {"scenecut": 0, "log-level": "none"} | {name.replace("_", "-"): value for name, value in params.items()}
    coder = {"x265-params": ":".join(f"{name}={value}" for name, value in params.items())}
    return {"codec": "libx265", "coder": coder}


MPEG = {"bf": "2", "g": "12", "sc_threshold": "1000000000"}
VPX = {"g": "16", "cpu-used": "8", "deadline": "realtime"}
# File, how it is written, whether its pictures are found without decoding all.
CLIPS = [
    ("b-frames.mp4", x264(keyint=10, bframes=3), True),
    ("b-frames.mkv", x264(keyint=10, bframes=3), True),
    ("one-keyframe.mp4", x264(keyint=250, bframes=3), True),
    ("gop-of-1.mp4", x264(keyint=1), True),
    ("open-gop.mp4", {"frames": 60, **x264(keyint=20, bframes=4, open_gop=1, b_pyramid="normal")}, True),
    ("open-gop.mkv", {"frames": 60, **x264(keyint=20, bframes=4, open_gop=1, b_pyramid="none")}, True),
    ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"}, True),
    ("one-picture.mp4", {"frames": 1}, True),
    ("four-pictures.mkv", {"frames": 4}, True),
    ("10-bit.mp4", {"pix_fmt": "yuv420p10le"}, True),
    ("odd-size.mp4", {"size": (65, 49), "pix_fmt": "yuv444p"}, True),
    ("hevc.mp4", x265(keyint=250, bframes=4), True),
    ("hevc-open-gop.mkv", x265(keyint=10, bframes=3, open_gop=1), True),
    ("vp8.webm", {"codec": "libvpx", "coder": VPX}, True),
    ("vp9.webm", {"codec": "libvpx-vp9", "coder": VPX}, True),
    ("av1.mp4", {"codec": "libsvtav1", "coder": {"preset": "12", "g": "16", "svtav1-params": "lp=1"}}, True),
    ("mpeg4.mp4", {"codec": "mpeg4", "coder": MPEG}, True),
    ("mpeg2.mkv", {"codec": "mpeg2video", "coder": MPEG}, True),
    ("mjpeg.mp4", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, True),
    ("prores.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, True),
    ("intra-refresh.mp4", {"size": (320, 64), **x264(keyint=15, intra_refresh=1, bframes=0)}, False),
    ("mpeg4.avi", {"codec": "mpeg4", "coder": MPEG}, False),
    ("h264.avi", {}, False),
    ("h264.ts", {}, False),
    ("h264.flv", {}, False),
    ("mpeg2.ts", {"codec": "mpeg2video", "coder": MPEG}, False),
    ("mpeg2.mpg", {"codec": "mpeg2video", "coder": MPEG}, False),
    ("ffv1.mkv", {"codec": "ffv1"}, False),
]


@pytest.mark.parametrize(("file", "kwargs", "quick"), CLIPS, ids=[file for file, *_ in CLIPS])
def test_pictures_are_those_of_a_full_decode(tmp_path, full_decodes, file, kwargs, quick):
    if kwargs.get("codec") == "libsvtav1" and not has_encoder("libsvtav1"):
        pytest.skip("no AV1 encoder")
    path = write_video(tmp_path / file, **kwargs)
    full = decode_all(path)
    for sampler in SAMPLERS.values():
        for frames in (1, 6, 12):
            assert_picks(path, sampler(frames), full)
    assert not full_decodes if quick else full_decodes


@needs_assets
@pytest.mark.filterwarnings("ignore:.* HDR:UserWarning")
@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_pictures_of_real_files_are_those_of_a_full_decode(path, full_decodes):
    full = decode_all(path)
    assert_picks(path, UniformTimeSampler(6), full)
    assert "truncated" not in assert_picks(path, RandomSegmentSampler(12), full).flags
    assert bool(full_decodes) == (path.suffix in {".avi", ".mpg"})


def test_a_full_decode_is_repeated_only_if_the_packets_were_wrong(tmp_path, full_decodes):
    read_frames(write_video(tmp_path / "a.avi", codec="mpeg4"), UniformSampler(6))
    assert len(full_decodes) == 1


def test_an_edit_list_hides_pictures(tmp_path, full_decodes):
    def start_five_pictures_later(stream, packet):
        shift = int(Fraction(5, 25) / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift

    whole = write_video(tmp_path / "whole.mp4")
    path = remux([whole], tmp_path / "edited.mp4", start_five_pictures_later, avoid_negative_ts="disabled")
    for sampler in SAMPLERS.values():
        assert assert_picks(path, sampler(6), decode_all(path)).num_frames == 26
    assert not full_decodes


def test_hidden_pictures_of_vp8_do_not_count(tmp_path, full_decodes):
    """As the alternate reference pictures, which this encoder makes of calmer clips only."""
    path = write_video(tmp_path / "a.webm", codec="libvpx", coder=VPX)
    spans = packet_spans(path)
    for k in (5, 20):
        start, _ = spans[k]
        patch(path, start, bytes([path.read_bytes()[start] & ~0x10]))  # show_frame
    for sampler in SAMPLERS.values():
        assert assert_picks(path, sampler(12), decode_all(path)).num_frames == 29
    assert not full_decodes


def every(step):
    """Calls every `step`-th packet a keyframe."""
    count = iter(range(10**6))

    def change(stream, packet):
        packet.is_keyframe = next(count) % step == 0

    return change


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"codec": "mpeg4", "coder": MPEG | {"g": "250"}},
        {"codec": "mpeg2video", "coder": MPEG | {"g": "250"}},
        x265(keyint=250, bframes=3),
        x264(keyint=10, bframes=3, open_gop=1),
    ],
    ids=["mpeg4", "mpeg2", "hevc", "h264"],
)
def test_a_picture_called_a_keyframe_that_is_none_is_found_out(tmp_path, full_decodes, kwargs, step):
    path = remux([write_video(tmp_path / "honest.mp4", **kwargs)], tmp_path / "lies.mp4", every(step))
    full = decode_all(path)
    for sampler in SAMPLERS.values():
        assert_picks(path, sampler(12), full)
    assert full_decodes


def test_a_keyframe_that_the_container_does_not_list(tmp_path, full_decodes):
    """FFmpeg knows it for one all the same, but seeking finds the one before."""

    def unlisted(stream, packet):
        packet.is_keyframe = packet.pts == 0

    whole = write_video(tmp_path / "whole.mp4", **x264(keyint=10, bframes=2))
    path = remux([whole], tmp_path / "a.mp4", unlisted)
    for sampler in SAMPLERS.values():
        assert_picks(path, sampler(6), decode_all(path))
    assert not full_decodes


def drop_first(stream, packet):
    return packet.dts > 0


def same_times(stream, packet):
    """Two pictures at 0.4 s."""
    if packet.pts * packet.time_base == Fraction(11, 25):
        packet.pts = packet.dts = int(Fraction(10, 25) / packet.time_base)


@pytest.mark.parametrize("change", [drop_first, same_times])
def test_packets_that_pictures_cannot_be_found_by(tmp_path, full_decodes, change):
    source = write_video(tmp_path / "source.mkv", codec="mpeg4", coder={"g": "12", "bf": "0"})
    path = remux([source], tmp_path / "odd.mkv", change)
    for sampler in SAMPLERS.values():
        assert_picks(path, sampler(12), decode_all(path))
    assert full_decodes


@pytest.mark.parametrize("file", ["cut.mp4", "cut.mkv"])
def test_leading_pictures_whose_open_gop_was_cut_off_do_not_count(tmp_path, file):
    """A file that starts with the second keyframe of an open GOP: what is shown before it cannot be decoded."""
    keyframes = []

    def from_the_second_keyframe(stream, packet):
        keyframes.extend([packet] * packet.is_keyframe)
        return len(keyframes) > 1

    whole = write_video(tmp_path / "whole.mp4", **x264(keyint=10, bframes=3, open_gop=1))
    path = remux([whole], tmp_path / file, from_the_second_keyframe)
    full = decode_all(path)
    assert 0 < len(full[0]) < len(packet_spans(path))
    for sampler in SAMPLERS.values():
        assert_picks(path, sampler(12), full)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("file", "states_its_length"), [("cut.mp4", True), ("cut.mkv", True), ("cut.ts", False)])
def test_a_file_cut_short_gives_what_decodes(tmp_path, file, states_its_length, name):
    path = write_video(tmp_path / file, **({"movflags": "faststart"} if file.endswith("mp4") else {}))
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    frames = assert_picks(path, SAMPLERS[name](6), decode_all(path, threads=1))
    assert 0 < frames.num_frames < 31
    assert ("truncated" in frames.flags) == states_its_length


@pytest.mark.parametrize("file", ["hit.mp4", "hit.mkv"])
def test_damage_in_the_middle_loses_only_what_it_hits(tmp_path, file):
    path = write_video(tmp_path / file)
    start, size = packet_spans(path)[15]
    patch(path, start, bytes(size))
    frames = assert_picks(path, DenseClipSampler(31), decode_all(path, threads=1))
    assert frames.num_frames == 30 and "truncated" in frames.flags


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_a_damaged_picture_that_others_are_built_on(tmp_path, codec):
    """The decoder conceals the damage without an error; what is built on the picture shows it."""
    kwargs = x264(keyint=250, bframes=0) if codec == "h264" else {"codec": codec, "coder": MPEG}
    whole = write_video(tmp_path / "whole.mp4", **kwargs)
    flagged = 0
    for number, (start, size) in enumerate(packet_spans(whole)):
        path = tmp_path / "hit.mp4"
        path.write_bytes(whole.read_bytes())
        patch(path, start + size // 2, np.random.default_rng(0).bytes(40))
        full = decode_all(path, threads=1)
        if len(full[0]) == 31:
            flagged += "truncated" in assert_picks(path, UniformSampler(4), full, seed=number).flags
    assert flagged > 3


def test_damage_is_not_looked_for_where_no_chosen_picture_needs_it(tmp_path, full_decodes):
    path = write_video(tmp_path / "a.mp4", **x264(keyint=10))
    start, size = packet_spans(path)[-1]
    patch(path, start, bytes(size))
    frames = read_frames(path, UniformSampler(1))
    assert frames.num_frames == 31 and not frames.flags and not full_decodes


def test_a_transport_stream_with_a_lost_packet_is_flagged(tmp_path):
    path = write_video(tmp_path / "a.ts")
    content = path.read_bytes()
    lost = len(content) // 188 // 2 * 188
    path.write_bytes(content[:lost] + content[lost + 188 :])
    assert "truncated" in assert_picks(path, UniformSampler(6), decode_all(path, threads=1)).flags


VFR = [8330 + t for t in (0, 40, 50, 300, 301, 900, 1000, 1900)]


@pytest.mark.parametrize("file", ["vfr.mkv", "vfr.mp4"])
@pytest.mark.parametrize("sampler", [DenseClipSampler(8), UniformTimeSampler(5)], ids=["index", "time"])
def test_times_are_real_and_start_at_zero(tmp_path, file, sampler):
    path = write_video(tmp_path / file, frames=8, pts=VFR)
    full = decode_all(path)
    assert [float(time - full[1][0]) for time in full[1]] == pytest.approx([(t - 8330) / 1000 for t in VFR], abs=1e-3)
    frames = assert_picks(path, sampler, full)
    if sampler.by_time:  # middles 0.19, 0.57, 0.95, 1.33, 1.71 s
        assert frames.index.tolist() == [2, 4, 5, 6, 6]


def test_sound_that_outlasts_the_picture_is_no_damage(tmp_path):
    parts = [write_video(tmp_path / "v.mp4"), write_audio(tmp_path / "a.mp4", seconds=3)]
    path = remux(parts, tmp_path / "both.mp4")
    assert not assert_picks(path, UniformSampler(6), decode_all(path)).flags


def number_at(path, at, order):
    return int.from_bytes(path.read_bytes()[at : at + 4], order)


@pytest.mark.parametrize("claim", [0, 9, 9999])
@pytest.mark.parametrize(
    ("file", "fields", "order"),
    [("a.avi", {b"avih": 8 + 16 - 4, b"strh": 8 + 32 - 4}, "little"), ("a.mp4", {b"stts": 12 - 4}, "big")],
    ids=["avi", "mp4"],
)
def test_the_count_of_the_header_is_not_believed(tmp_path, file, fields, order, claim):
    path = write_video(tmp_path / file, codec="mpeg4")
    expected = read_frames(path, UniformSampler(6))
    for name, offset in fields.items():
        at = path.read_bytes().index(name) + 4 + offset
        assert number_at(path, at, order) == 31
        patch(path, at, claim.to_bytes(4, order))
    frames = read_frames(path, UniformSampler(6))
    assert frames.num_frames == 31 and frames.index.tolist() == expected.index.tolist()
    assert (frames.pixels == expected.pixels).all()


def test_of_two_video_streams_the_default_one_is_read(tmp_path):
    parts = [write_video(tmp_path / f"{w}.mp4", size=(w, 48), frames=20) for w in (32, 96)]
    path = remux(parts, tmp_path / "both.mp4", dispositions={0: Disposition(0), 1: Disposition.default})
    assert read_frames(path, UniformSampler(6)).pixels.shape[-1] == 96


def test_cover_art_is_not_a_video(tmp_path):
    picture = write_video(tmp_path / "cover.mkv", frames=1, codec="mjpeg", size=(320, 240), pix_fmt="yuvj420p")
    sound = write_audio(tmp_path / "a.mp4")
    song = remux([sound, picture], tmp_path / "song.mp4", dispositions={1: Disposition.attached_pic})
    with pytest.raises(MediaError, match="no_video_stream"):
        read_frames(song, UniformSampler(6))
    video = write_video(tmp_path / "v.mp4")
    film = remux([video, picture], tmp_path / "film.mp4", dispositions={1: Disposition.attached_pic})
    assert (read_frames(film, UniformSampler(6)).pixels == read_frames(video, UniformSampler(6)).pixels).all()


# Kr and Kb of ITU-T H.273, by its numbers of matrices.
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def by_formula(planes, bits, matrix, full_range):
    """ITU-T H.273, 8.3: 4:4:4 planes (3, H, W) to RGB (H, W, 3)."""
    unit, (red, blue) = 2 ** (bits - 8), MATRICES[matrix]
    luma, *chroma = planes.astype(np.float64)
    if full_range:
        luma, chroma = luma / (2**bits - 1), [(c - 128 * unit) / (2**bits - 1) for c in chroma]
    else:
        luma, chroma = (luma - 16 * unit) / (219 * unit), [(c - 128 * unit) / (224 * unit) for c in chroma]
    r, b = luma + 2 * (1 - red) * chroma[1], luma + 2 * (1 - blue) * chroma[0]
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return (np.stack([r, g, b], -1) * 255).round().clip(0, 255)


def first_planes(path, bits):
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        kind = np.uint8 if bits == 8 else np.dtype("<u2")
        rows = [np.frombuffer(plane, kind).reshape(frame.height, -1)[:, : frame.width] for plane in frame.planes]
        return np.stack(rows)


@pytest.mark.parametrize("matrix", [None, *MATRICES])
@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("codec", "bits"), [("libx264", 8), ("libx264", 10), ("libx265", 12)], ids=["8-bit", "10-bit", "12-bit"]
)
def test_colour_is_that_of_the_standard(tmp_path, codec, bits, full_range, matrix):
    colour = {"color_range": 2 if full_range else 1} | ({} if matrix is None else {"colorspace": matrix})
    kwargs = x265() if codec == "libx265" else {}
    pix_fmt = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    path = write_video(tmp_path / "a.mp4", frames=1, size=(65, 49), pix_fmt=pix_fmt, colour=colour, **kwargs)
    expected = by_formula(first_planes(path, bits), bits, matrix or 6, full_range)
    (picture,) = pick(str(path), lambda times_s: np.array([0])).pictures.values()
    assert np.abs(picture.astype(int) - expected).max() <= 2


@needs_ffmpeg
@pytest.mark.parametrize("size", [(64, 48), (65, 49)], ids=["even", "odd"])
@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [
        ("libx264", "yuv420p"),
        ("libx264", "yuvj420p"),
        ("libx264", "yuv420p10le"),
        ("libx264", "yuv422p"),
        ("libx264", "yuv444p10le"),
        ("libx264", "gray"),
        ("libx264rgb", "rgb24"),
        ("ffv1", "yuv420p12le"),
        ("ffv1", "yuva420p"),
        ("ffv1", "yuv410p"),
        ("libx265", "yuv420p"),
        ("libvpx-vp9", "yuv422p"),
    ],
)
def test_colour_is_that_of_ffmpeg(tmp_path, codec, pix_fmt, size):
    if size[0] % 2 and codec in {"libx264", "libx265"} and ("420" in pix_fmt or "422" in pix_fmt):
        pytest.skip("the encoder takes no odd sizes where chroma is subsampled")
    for matrix in (None, 1, 6):
        colour = {} if matrix is None else {"colorspace": matrix}
        path = write_video(tmp_path / f"{matrix}.mkv", 1, size, codec, pix_fmt=pix_fmt, colour=colour)
        (picture,) = pick(str(path), lambda times_s: np.array([0])).pictures.values()
        assert np.abs(picture.astype(int) - by_ffmpeg(path)).max() <= 2


@needs_assets
@needs_ffmpeg
@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_colour_of_real_files_is_that_of_ffmpeg(path):
    with av.open(str(path)) as container:
        turns = next(container.decode(video=0)).rotation // 90
    (picture,) = pick(str(path), lambda times_s: np.array([0])).pictures.values()
    assert np.abs(picture.astype(int) - np.rot90(by_ffmpeg(path), turns)).max() <= 2


def long_clip(folder, frames, gop=20):
    """A clip of `frames` pictures, a keyframe every `gop`, made without encoding them all."""
    short = write_video(folder / "short.mp4", frames=100, size=(32, 32), **x264(keyint=gop, bframes=2))
    return repeat(short, folder / f"{frames}.mp4", frames // 100)


def test_cost_does_not_grow_with_the_number_of_pictures(tmp_path, monkeypatch, full_decodes):
    came_out, decode_run = [], decode._decode_run
    monkeypatch.setattr(decode, "_decode_run", lambda *args: (came_out.append(f.pts) or f for f in decode_run(*args)))
    for frames in (2_000, 20_000):
        came_out.clear()
        path = long_clip(tmp_path, frames)
        assert read_frames(path, UniformSampler(12)).num_frames == frames
        assert 12 <= len(came_out) <= 12 * (20 // 3 + 4)  # two of three are B-frames that nothing is built on
    assert not full_decodes


def test_only_the_chosen_pictures_are_kept(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.h264", frames=100, size=(320, 240))  # which has to be decoded in full
    to_rgb, converted = decode._to_rgb, []
    monkeypatch.setattr(decode, "_to_rgb", lambda frame: converted.append(1) or to_rgb(frame))
    tracemalloc.start()
    picked = pick(str(path), lambda times_s: np.array([5, 5, 50, 99]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(picked.pictures) == [5, 50, 99] and len(converted) == 3
    assert peak < 5 * 320 * 240 * 3


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from data.decode import MediaError, pick

def peak_mib(path):
    try:
        print(len(pick(path, lambda times_s: np.array([0, len(times_s) - 1])).pictures))
    except MediaError as error:
        print(error.reason)
    # Not getrusage: to that the process which started this one counts, too.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

first, second = map(peak_mib, sys.argv[1:])
print(second - first)
"""


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read peak memory from")


def extra_memory(ordinary, path):
    """What reading `path` gives, and how much more memory, in MiB, that takes at its peak than an ordinary clip."""
    command = [sys.executable, "-c", PEAK, str(ordinary), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, result, extra = done.stdout.split()
    return result, float(extra)


@needs_proc
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    result, extra = extra_memory(long_clip(tmp_path, 100), long_clip(tmp_path, 20_000))
    assert result == "2" and extra < 30


GIF_BOMB = b"GIF89a\x80\x3e\x80\x3e\x80\0\0" + bytes(6) + 3 * (b",\0\0\0\0\x80\x3e\x80\x3e\0\2\2L\1\0") + b";"
RAW = {
    "h264": ("h264", {"coder": {"profile": "baseline", "bf": "0", "x264-params": "scenecut=0"}}),
    "hevc": ("hevc", x265(keyint=99, bframes=0)),
    "mpeg2": ("m2v", {"codec": "mpeg2video"}),
}


@needs_proc
@pytest.mark.parametrize("grows", [False, True], ids=["at-once", "in-mid-stream"])
@pytest.mark.parametrize("codec", [*RAW, "gif"])
def test_a_picture_of_a_gigabyte_is_refused_before_the_memory_is_taken(tmp_path, codec, grows):
    """16000 x 16000: 384 MB and more in a frame of the decoder, several of which it holds."""
    ordinary = write_video(tmp_path / "ordinary.mp4")
    if codec == "gif":
        path = tmp_path / "bomb.gif"
        path.write_bytes(GIF_BOMB)
    else:
        extension, kwargs = RAW[codec]
        path = write_video(tmp_path / f"bomb.{extension}", frames=4, **kwargs)
        small = path.read_bytes()
        path.write_bytes(small * grows + claim_size(small, 16000, 16000))
    result, extra = extra_memory(ordinary, path)
    assert result == "too_large"
    assert extra < 300  # tables of the decoder that go with the size claimed take up to 200


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    path = write_video(tmp_path / "large.mp4")
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(decode, "_scan", None)
    with pytest.raises(MediaError, match=r"too_large \(64 x 48 pixels"):
        read_frames(path, UniformSampler(6))


@pytest.mark.parametrize("file", ["a.mkv", "a.h264"])
def test_a_picture_that_grows_above_the_limit_is_refused(tmp_path, monkeypatch, file):
    number = iter(range(8))

    def timed(stream, packet):
        packet.pts = packet.dts = next(number)
        packet.time_base = Fraction(1, 25)

    small, large = (write_video(tmp_path / f"{w}.h264", 4, (w, 48), coder={"bf": "0"}) for w in (64, 128))
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    path = remux([both], tmp_path / file, timed)
    assert read_frames(path, DenseClipSampler(8)).num_frames == 8
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 48)
    with pytest.raises(MediaError, match="too_large"):
        read_frames(path, DenseClipSampler(8))


KEY = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0f" * 16, "encryption_kid": "1e" * 16}


def write_blank(path):
    """A good header over pictures that are all zero bytes."""
    for start, size in packet_spans(write_video(path)):
        patch(path, start, bytes(size))


def write_init_segment(path):
    content = write_video(path, movflags="frag_keyframe+empty_moov").read_bytes()
    path.write_bytes(content[: content.index(b"moof") - 4])


def write_other_container(path):
    write_video(path.with_suffix(".mjpeg"), codec="mjpeg", pix_fmt="yuvj420p").rename(path)


def write_cut_index(path):
    content = write_video(path, movflags="faststart").read_bytes()
    path.write_bytes(content[: content.index(b"moov") + 100])


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile bad.mp4.real.mp4\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nbad.mp4.real.mp4\n#EXT-X-ENDLIST\n",
}
BAD = {
    "missing": ("missing", lambda path: None),
    "folder": ("refused", Path.mkdir),
    "fifo": ("refused", os.mkfifo),
    "device": ("refused", lambda path: path.symlink_to("/dev/zero")),
    "empty": ("unreadable", Path.touch),
    "text": ("unreadable", lambda path: path.write_text("not a video\n" * 99)),
    "other-container": ("refused", write_other_container),
    "ffconcat": ("refused", lambda path: path.write_text(PLAYLISTS["ffconcat"])),
    "m3u8": ("unreadable", lambda path: path.write_text(PLAYLISTS["m3u8"])),
    "no-index": ("truncated", lambda path: path.write_bytes(write_video(path).read_bytes()[:3000])),
    "cut-index": ("truncated", write_cut_index),
    "audio": ("no_video_stream", write_audio),
    "blank-data": ("no_frames", write_blank),
    "init-segment": ("no_frames", write_init_segment),
    "encrypted": ("encrypted", lambda path: write_video(path, **KEY)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_a_media_error_with_its_reason(tmp_path, case):
    reason, make = BAD[case]
    write_video(tmp_path / "bad.mp4.real.mp4")  # what a playlist would reach if it were followed
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(MediaError) as caught:
        read_frames(path, UniformSampler(6))
    assert caught.value.reason == reason and caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: {reason} (")
    if reason not in {"no_frames", "encrypted"}:  # which the header does not tell
        with pytest.raises(MediaError) as early:
            check_readable(path)
        assert early.value.reason == reason


def test_a_codec_without_decoder_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(MediaError, match=r"unreadable \(no decoder"):
        read_frames(path, UniformSampler(6))


@pytest.mark.parametrize("name", ["with space.mp4", "50%d:é🎬.mp4", "concat:a.mp4|b.mp4", "pipe:0", "http:x", "-i"])
def test_any_file_name_is_only_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    plain = write_video(tmp_path / "plain.mp4")
    Path(name).write_bytes(plain.read_bytes())
    assert (read_frames(name, UniformSampler(2)).pixels == read_frames(plain, UniformSampler(2)).pixels).all()


@pytest.mark.parametrize(
    "address",
    [
        "concat:plain.mp4|plain.mp4",
        "file:plain.mp4",
        "subfile,,start,0,end,0,,:plain.mp4",
        "pipe:0",
        "http://127.0.0.1:9/plain.mp4",
        "tcp://127.0.0.1:9",
    ],
)
def test_addresses_lead_nowhere(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.mp4")
    with pytest.raises(MediaError, match="missing"):
        read_frames(address, UniformSampler(2))


def test_metadata_that_is_not_utf8_opens(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    content = path.read_bytes()
    assert content.count(b"Lavf") == 1  # the name of the muxer, a text field
    path.write_bytes(content.replace(b"Lavf", b"\xff\xfe\xfd\xfc"))
    assert read_frames(path, UniformSampler(2)).num_frames == 31


def test_media_error_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError("refused", "a.mp4", "why")))
    assert (error.reason, error.path, error.detail, str(error)) == ("refused", "a.mp4", "why", "a.mp4: refused (why)")


FUZZ = """
import faulthandler, signal, sys, warnings
from collections import Counter
from pathlib import Path
import av, numpy as np, torch
from data.samplers import SAMPLERS
from data.video import MediaError, read_frames

faulthandler.enable()
av.logging.set_level(None)
warnings.simplefilter("ignore")
*sources, target = map(Path, sys.argv[1:])
random, outcomes = np.random.default_rng(0), Counter()
for case in range(500):
    content = bytearray(sources[case % len(sources)].read_bytes())
    for _ in range(random.integers(1, 5)):
        reach = 600 if random.random() < 0.5 else len(content)
        at = int(random.integers(reach)) * random.choice([1, -1])  # headers lie at the start or at the end
        content[at] = random.integers(256)
    if case % 5 == 0:
        del content[random.integers(len(content)) :]
    target.write_bytes(content)
    sampler = list(SAMPLERS.values())[case % len(SAMPLERS)](6)
    signal.alarm(5)
    try:
        frames = read_frames(target, sampler, torch.Generator().manual_seed(case))
        assert frames.pixels.shape[:2] == (6, 3) and (frames.times_s.diff() >= 0).all() or not sampler.by_time
        outcomes["frames"] += 1
    except MediaError:
        outcomes["error"] += 1
    except Exception:
        print(f"case {case} of {sources[case % len(sources)].name}", file=sys.stderr)
        raise
print(outcomes["frames"], outcomes["error"])
"""


def test_500_damaged_files_give_frames_or_a_media_error(tmp_path):
    small = {"frames": 12, "size": (48, 32)}
    sources = [
        write_video(tmp_path / "a.mp4", **small),
        write_video(tmp_path / "b.mkv", frames=12, size=(96, 64), **x265(keyint=6, bframes=2)),  # smaller, x265 crashes
        write_video(tmp_path / "c.ts", **small, codec="mpeg2video"),
        write_video(tmp_path / "d.avi", **small, codec="mpeg4"),
        write_video(tmp_path / "e.mp4", **small, movflags="frag_keyframe+empty_moov"),
        write_video(tmp_path / "f.webm", **small, codec="libvpx-vp9", coder={"cpu-used": "8", "g": "6"}),
    ]
    command = [sys.executable, "-c", FUZZ, *map(str, sources), str(tmp_path / "damaged")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    frames, errors = map(int, done.stdout.split())
    assert frames + errors == 500 and min(frames, errors) > 50
