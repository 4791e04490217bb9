from dataclasses import dataclass

import pytest
import torch

from data import decode
from data.samplers import DenseClipSampler, RandomSegmentSampler, UniformSampler, UniformTimeSampler, WithMotionClips
from data.video import MediaError, read_frames, resize_square
from tests.media import assert_picks, decode_all, packet_spans, patch, write_video


def test_frames_are_contiguous_bytes_with_their_places_and_times(tmp_path):
    frames = read_frames(write_video(tmp_path / "a.mp4"), DenseClipSampler(4, stride=2))
    assert frames.pixels.dtype == torch.uint8 and frames.pixels.shape == (4, 3, 48, 64)
    assert frames.pixels.is_contiguous()
    assert frames.num_frames == 31 and frames.flags == frozenset()
    assert frames.index.dtype == torch.int64 and frames.index.tolist() == [12, 14, 16, 18]
    assert frames.times_s.dtype == torch.float64 and frames.times_s.tolist() == [12 / 25, 14 / 25, 16 / 25, 18 / 25]


@pytest.mark.parametrize("pictures", [1, 4])
def test_a_video_with_fewer_pictures_than_asked_repeats_some(tmp_path, pictures):
    frames = read_frames(write_video(tmp_path / "a.mp4", frames=pictures), UniformSampler(6))
    assert len(frames.pixels) == 6 and frames.index.tolist() == UniformSampler(6)(pictures).tolist()
    for k in range(1, 6):
        same = frames.index[k] == frames.index[k - 1]
        assert torch.equal(frames.pixels[k], frames.pixels[k - 1]) == same


def test_no_timestamps_give_nan_and_no_sampling_by_time(tmp_path):
    path = write_video(tmp_path / "raw.h264")
    assert read_frames(path, UniformSampler(3)).times_s.isnan().all()
    with pytest.raises(MediaError, match=r"unreadable \(no timestamps"):
        read_frames(path, UniformTimeSampler(3))


def test_times_that_jump_back_give_no_sampling_by_time(tmp_path):
    """As in a transport stream whose second half comes from another recording."""

    parts = [[start + 40 * k for k in range(20)] for start in (9000, 0)]
    parts = [write_video(tmp_path / f"{pts[0]}.ts", frames=20, pts=pts) for pts in parts]
    path = tmp_path / "jump.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read_frames(path, UniformSampler(6)).num_frames == 40
    with pytest.raises(MediaError, match="none in order"):
        read_frames(path, UniformTimeSampler(6))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path, rotation):
    turned = read_frames(write_video(tmp_path / "r.mp4", rotation=rotation), UniformSampler(2))
    plain = read_frames(write_video(tmp_path / "p.mp4"), UniformSampler(2)).pixels
    # The file says: rotate counterclockwise. A quarter turn brings the right edge to the top.
    quarter_turns = {90: 1, 180: 2, -90: 3}[rotation]
    for _ in range(quarter_turns):
        plain = plain.transpose(-1, -2).flip(-2)
    assert torch.equal(turned.pixels, plain)


@pytest.mark.parametrize("rotation", [45, 135])
def test_rotation_by_a_part_of_a_quarter_is_ignored_with_a_warning(tmp_path, rotation):
    with pytest.warns(UserWarning, match=r"r\.mp4: .* a part of a quarter"):
        tilted = read_frames(write_video(tmp_path / "r.mp4", rotation=rotation), UniformSampler(2))
    assert tilted.flags == {"rotation_ignored"}
    assert torch.equal(tilted.pixels, read_frames(write_video(tmp_path / "p.mp4"), UniformSampler(2)).pixels)


@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_hdr_is_shown_with_a_warning(tmp_path, transfer):
    path = write_video(tmp_path / "hdr.mp4", pix_fmt="yuv420p10le", colour={"color_trc": transfer})
    with pytest.warns(UserWarning, match=r"hdr\.mp4: HDR"):
        frames = read_frames(path, UniformSampler(2))
    assert frames.flags == {"hdr"}


def test_a_change_of_size_is_resized_to_the_first_chosen_picture(tmp_path):
    small, large = (write_video(tmp_path / f"{w}.h264", frames=4, size=(w, h)) for w, h in [(64, 48), (128, 80)])
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    frames = read_frames(both, DenseClipSampler(8))
    assert frames.pixels.shape == (8, 3, 48, 64) and frames.flags == {"resized"}
    assert torch.equal(frames.pixels[:4], read_frames(small, DenseClipSampler(4)).pixels)
    expected = bicubic(read_frames(large, DenseClipSampler(4)).pixels, 48, 64)
    assert (frames.pixels[4:].int() - expected.int()).abs().max() <= 1


def test_root_is_where_a_path_starts(tmp_path):
    plain = write_video(tmp_path / "plain.mp4")
    root = tmp_path / "videos"
    root.mkdir()
    (root / "link.mp4").symlink_to(plain)  # the owner of the folder may link where they like
    assert read_frames("link.mp4", UniformSampler(2), root=root).num_frames == 31


@pytest.mark.parametrize("path", ["../plain.mp4", "a/../../plain.mp4", "{root}/inside.mp4", "/dev/zero", ""])
def test_no_path_leads_out_of_root(tmp_path, path):
    write_video(tmp_path / "plain.mp4")
    root = tmp_path / "videos"
    root.mkdir()
    write_video(root / "inside.mp4")
    with pytest.raises(MediaError, match="refused"):
        read_frames(path.format(root=root), UniformSampler(2), root=root)


def test_another_process_gives_the_same_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    here, there = (
        read_frames(path, RandomSegmentSampler(6), torch.Generator().manual_seed(3), timeout_s=timeout_s)
        for timeout_s in (None, 60)
    )
    assert torch.equal(here.index, there.index) and torch.equal(here.pixels, there.pixels)
    assert torch.equal(here.times_s, there.times_s) and here.flags == there.flags


def test_a_damaged_file_draws_the_same_random_numbers_as_a_whole_one_of_its_length(tmp_path):
    """The sampler is asked twice: first about 31 pictures, then about the 30 that decode."""
    path = write_video(tmp_path / "a.mp4")
    start, size = packet_spans(path)[15]
    patch(path, start, bytes(size))
    frames = read_frames(path, RandomSegmentSampler(31), torch.Generator().manual_seed(3))
    assert frames.num_frames == 30
    assert torch.equal(frames.index, RandomSegmentSampler(31)(30, torch.Generator().manual_seed(3)))


@dataclass(frozen=True)
class Chosen:
    """Frames by number."""

    index: tuple[int, ...]
    by_time = random = False

    def __call__(self, num_frames, generator=None):
        return torch.tensor(self.index)


@pytest.mark.parametrize("timeout_s", [None, 60])
@pytest.mark.parametrize("name", ["a.mp4", "a.h264"])  # by stretches, and all decoded
@pytest.mark.parametrize("inner", [UniformSampler(6), RandomSegmentSampler(6)])
def test_frames_and_clips_read_together_are_those_read_one_after_the_other(tmp_path, inner, name, timeout_s):
    path, seed = write_video(tmp_path / name), torch.Generator().manual_seed(3)
    both = read_frames(path, WithMotionClips(inner, 3, 8), seed, timeout_s=timeout_s)
    index = both.index.tolist()
    assert sorted(index) != index and len(set(index)) < len(index) == 6 + 3 * 8
    frames = read_frames(path, inner, torch.Generator().manual_seed(3))
    assert torch.equal(both.pixels[:6], frames.pixels) and torch.equal(both.index[:6], frames.index)
    clips = read_frames(path, Chosen(tuple(index[6:])))
    assert torch.equal(both.pixels[6:], clips.pixels)
    torch.testing.assert_close(both.times_s[6:], clips.times_s, rtol=0, atol=0, equal_nan=True)
    for k, number in enumerate(index):
        assert torch.equal(both.pixels[k], read_frames(path, Chosen((number,))).pixels[0])


def test_frames_and_clips_take_one_decoding_that_keeps_each_picture_once(tmp_path, monkeypatch):
    picked = []
    pick = decode.pick
    monkeypatch.setattr(decode, "pick", lambda *args: picked.append(pick(*args)) or picked[-1])
    both = read_frames(write_video(tmp_path / "a.mp4"), WithMotionClips(UniformSampler(6), 3, 8))
    (only,) = picked
    assert only.pictures.keys() == set(both.index.tolist()) and len(both.pixels) == 30


@pytest.mark.parametrize("by_time", [False, True])
def test_frames_and_clips_of_an_irregular_video_by_index_and_by_time(tmp_path, by_time):
    pts = [round(40 * k + 600 * (k > 20)) for k in range(31)]
    path = write_video(tmp_path / "a.mkv", pts=pts)
    inner = UniformTimeSampler(4) if by_time else UniformSampler(4)
    assert_picks(path, WithMotionClips(inner, 2, 8), decode_all(path))


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
