"""Synthetic clips: the files are what they say they are."""

import math

import pytest
import torch

from data import synthetic
from data.labels import read_labels
from data.samplers import UniformSampler
from data.video import read_frames


def laplacian_energy(frames):
    """Mean squared second difference: high with fine detail, low with blur."""
    return (frames[..., 2:, 1:-1] + frames[..., :-2, 1:-1] - 2 * frames[..., 1:-1, 1:-1]).square().mean().item()


def a_scene(index=0):
    return synthetic.scene(synthetic.clip_generator(0, "test", index)), torch.Generator().manual_seed(0)


def test_a_clip_follows_from_its_name_alone():
    a, b = synthetic.render(0, "train", 5), synthetic.render(0, "train", 5)
    torch.testing.assert_close(a.frames, b.frames, atol=1e-5, rtol=0)
    assert a[1:] == b[1:]
    others = [synthetic.render(0, "val", 5), synthetic.render(1, "train", 5), synthetic.render(0, "train", 6)]
    assert all((a.frames - other.frames).abs().mean() > 0.01 for other in others)


def test_a_clip_has_the_same_bytes_every_time(tmp_path):
    written = set()
    for index in (2, 6):  # which differ now and then with assembly
        rendered = synthetic.render(21, "train", index)
        for _ in range(12):
            synthetic.write_mp4(rendered.frames, rendered.crf, tmp_path / "clip.mp4")
            written.add((index, (tmp_path / "clip.mp4").read_bytes()))
    assert len(written) == 2


def test_distortions_do_what_their_names_say_and_more_so_with_severity():
    frames, generator = a_scene()
    energies = [laplacian_energy(synthetic.blur(frames, s, generator)) for s in (0.1, 0.5, 1.0)]
    assert laplacian_energy(frames) > energies[0] > energies[1] > energies[2]

    stds = [(synthetic.noise(frames, s, generator) - frames).std().item() for s in (0.25, 0.75)]
    assert stds == pytest.approx([0.06, 0.14], rel=0.01)

    for severity in (0.1, 0.5, 1.0):
        held = synthetic.stutter(frames, severity, generator)
        repeats = sum(torch.equal(held[k], held[k + 1]) for k in range(len(held) - 1))
        assert repeats >= 5 + 8 * severity

    def saturation(x):
        return (x - x.mean(1, keepdim=True)).square().mean().item()

    grey = synthetic.exposure(frames, 1.0, torch.Generator().manual_seed(2))
    gain = grey.mean().item() / frames.mean().item()
    assert gain == pytest.approx(2.4, rel=1e-3) or gain == pytest.approx(1 / 2.4, rel=1e-3)
    assert saturation(grey / gain) < 0.05 * saturation(frames)


def test_an_undistorted_scene_moves_in_every_frame():
    frames, _ = a_scene()
    assert all((frames[k + 1] - frames[k]).abs().mean() > 0.01 for k in range(len(frames) - 1))


def test_opinion_falls_with_every_severity_and_spreads_as_the_raters_do():
    def mean_opinion(severities):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor([synthetic.opinion(severities, generator) for _ in range(2000)])
        return drawn.mean().item(), drawn.std().item()

    for name in synthetic.IMPACT:
        values = [mean_opinion({name: s})[0] for s in (0.2, 0.5, 0.9)]
        assert values == sorted(values, reverse=True)
        assert mean_opinion({"blur": 0.3, name: 0.5})[0] <= values[1]
    mean, std = mean_opinion({"blur": 0.4, "noise": 0.2})
    assert mean == pytest.approx(1 + 4 * (1 - 0.9 * 0.4) * (1 - 0.85 * 0.2), abs=0.02)
    assert std == pytest.approx(0.6 / math.sqrt(20), rel=0.1)


def test_written_files_read_back_and_compression_shows(tmp_path):
    labels = synthetic.write_clips(tmp_path / "clips", {"train": 3, "val": 2}, seed=7)
    clips = read_labels(labels)
    assert [clip.split for clip in clips] == ["train"] * 3 + ["val"] * 2
    for clip in clips:
        decoded = read_frames(tmp_path / "clips" / clip.path, UniformSampler(synthetic.NUM_FRAMES))
        assert decoded.num_frames == synthetic.NUM_FRAMES and not decoded.flags
        assert decoded.pixels.shape[1:] == (3, synthetic.SIDE, synthetic.SIDE)
        assert 1 <= clip.mos <= 5 and set(clip.extra["severities"]) <= set(synthetic.IMPACT)

    frames, _ = a_scene()
    errors = []
    for crf in (synthetic.CRF_CLEAN, synthetic.compression_crf(0.1), synthetic.compression_crf(1.0)):
        synthetic.write_mp4(frames, crf, tmp_path / "x.mp4")
        decoded = read_frames(tmp_path / "x.mp4", UniformSampler(synthetic.NUM_FRAMES))
        errors.append((decoded.pixels / 255 - frames[decoded.index]).square().mean().sqrt().item())
    assert errors[0] < errors[1] < errors[2]
    assert laplacian_energy(decoded.pixels / 255) < 0.5 * laplacian_energy(frames)


def test_an_interrupted_writing_leaves_no_label_file(tmp_path):
    def stop_at_two(clips):
        for k, clip in enumerate(clips):
            if k == 2:
                raise KeyboardInterrupt
            yield clip

    with pytest.raises(KeyboardInterrupt):
        synthetic.write_clips(tmp_path / "clips", {"train": 4}, progress=stop_at_two)
    assert not (tmp_path / "clips").exists()
    assert synthetic.write_clips(tmp_path / "clips", {"train": 1}).exists()
