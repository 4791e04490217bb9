"""Synthetic clips with known distortions: small, real H.264 files and the MOS a panel of raters would give them.

A clip is a moving camera over a texture with a natural 1/f spectrum, with moving objects in front of it, degraded by up
to two distortions. Everything about clip `i` of a split follows from `(seed, split, i)`, so splits are disjoint and a
file can be made again alone. Severity is 0 (none) to 1 (worst); the opinion score falls monotonically with it:

    MOS = clip(1 + 4 * prod_d (1 - impact_d * severity_d) + rater noise, 1, 5)

    python -m data.synthetic --out clips/demo            # mp4 files and labels.jsonl

Legend: T frames in the file, S side in pixels. Frames are float32 RGB in [0, 1], (T, 3, S, S), until they are encoded.
"""

import argparse
import hashlib
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from data.labels import Clip, write_labels

SIDE = 96  # pixels
NUM_FRAMES = 24
FPS = 12
CRF_CLEAN = 12  # x264 quality of a clip without the compression distortion: visually lossless
SPLITS = {"train": 320, "val": 64, "test": 160}

# How much of the quality each distortion takes away at severity 1.
IMPACT = {"blur": 0.9, "noise": 0.85, "compression": 0.9, "exposure": 0.7, "stutter": 0.6}
# Pairs that do not go together: an encoder at a high rate factor smooths noise away and has nothing left to take from a
# blurred picture, so nobody could see the second distortion.
HIDDEN_PAIRS = ({"noise", "compression"}, {"blur", "compression"})
RATERS = 20
RATER_STD = 0.6  # standard deviation of one rater's opinion, in MOS units


class Rendered(NamedTuple):
    """A clip before encoding: `frames` (T, 3, S, S) in [0, 1], x264 `crf`, `severities` by name, `mos` in 1..5."""

    frames: torch.Tensor
    crf: int
    severities: dict[str, float]
    mos: float


def clip_generator(seed: int, split: str, index: int) -> torch.Generator:
    """The random stream of one clip, a function of its name alone."""
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def texture(side: int, generator: torch.Generator) -> torch.Tensor:
    """A coloured field (3, side, side) whose amplitude falls as 1/f^a, a in [1.2, 1.35], as in natural images."""
    fy = torch.fft.fftfreq(side)[:, None]
    fx = torch.fft.rfftfreq(side)[None, :]
    amplitude = (fy.square() + fx.square()).sqrt().clamp_min(1 / side) ** -uniform(generator, 1.2, 1.35)
    noise = torch.randn(3, side, side, generator=generator)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(side, side))
    # Channels of natural images are strongly correlated: mostly luminance, a little colour.
    mix = 0.8 * torch.ones(3, 3) / 3 + 0.35 * torch.randn(3, 3, generator=generator) / 3
    field = torch.einsum("cd,dhw->chw", mix, field)
    field = (field - field.mean()) / field.std()
    tint = torch.tensor([uniform(generator, 0.35, 0.65) for _ in range(3)])
    return (tint[:, None, None] + uniform(generator, 0.14, 0.22) * field).clamp(0, 1)


def scene(generator: torch.Generator) -> torch.Tensor:
    """An undistorted clip (T, 3, S, S): camera pan, zoom and roll over a texture, and one to three moving objects."""
    time = torch.linspace(0, 1, NUM_FRAMES)
    backdrop = texture(2 * SIDE, generator)
    angle, roll = uniform(generator, 0, 2 * math.pi), uniform(generator, -0.15, 0.15)
    reach = uniform(generator, 0.25, 0.45)  # path length in units of the backdrop's half width: 1 to 2 pixels a frame
    zoom = 0.5 * (1 + uniform(generator, -0.08, 0.08) * time)
    theta = torch.zeros(NUM_FRAMES, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * torch.cos(roll * time), -zoom * torch.sin(roll * time)
    theta[:, 1, 0], theta[:, 1, 1] = zoom * torch.sin(roll * time), zoom * torch.cos(roll * time)
    theta[:, 0, 2], theta[:, 1, 2] = (time - 0.5) * reach * math.cos(angle), (time - 0.5) * reach * math.sin(angle)
    grid = F.affine_grid(theta, [NUM_FRAMES, 3, SIDE, SIDE], align_corners=False)
    frames = F.grid_sample(backdrop.expand(NUM_FRAMES, -1, -1, -1), grid, "bicubic", "reflection", False)

    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    for _ in range(int(uniform(generator, 1, 4))):
        start = torch.tensor([uniform(generator, -0.8, 0.8) for _ in range(2)])
        travel = torch.tensor([uniform(generator, -1, 1) for _ in range(2)])
        centre = start + travel * time[:, None]  # (T, 2)
        radius, power = uniform(generator, 0.15, 0.35), uniform(generator, 2, 6)  # power 2: ellipse, 6: rounded box
        distance = ((x - centre[:, 0, None, None]).abs() ** power + (y - centre[:, 1, None, None]).abs() ** power) ** (
            1 / power
        )
        cover = ((radius - distance) * SIDE / 2 + 0.5).clamp(0, 1)[:, None]  # one-pixel soft edge
        frames = torch.lerp(frames, texture(SIDE, generator).expand_as(frames), cover)
    return frames.clamp(0, 1)


def blur(frames: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian blur, standard deviation 0.6 to 3.6 pixels."""
    return gaussian_blur(frames, 15, 0.6 + 3.0 * severity)


def noise(frames: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """White noise drawn anew for each frame, standard deviation 0.02 to 0.18 of full scale."""
    return frames + (0.02 + 0.16 * severity) * torch.randn(frames.shape, generator=generator)


def exposure(frames: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Over- or underexposure with a loss of colour: gain away from 1 by up to 2.4 times, saturation down to 0.2."""
    gain = (1 + 1.4 * severity) ** (1 if uniform(generator, 0, 1) < 0.5 else -1)
    grey = frames.mean(1, keepdim=True)
    return torch.lerp(grey, frames, 1 - 0.8 * severity) * gain


def stutter(frames: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Held frames followed by a jump: one freeze of 6 to 20 frames, or a hold on every 5th to 12th frame."""
    index = torch.arange(NUM_FRAMES)
    if uniform(generator, 0, 1) < 0.5:
        length = round(6 + 14 * severity)
        first = int(uniform(generator, 0, NUM_FRAMES - length + 1))
        index[first : first + length] = first
    else:
        hold = round(5 + 7 * severity)
        index = index // hold * hold
    return frames[index]


def compression_crf(severity: float) -> int:
    """x264's constant rate factor for a compression severity: 34 to 51 (the codec's worst)."""
    return round(34 + 17 * severity)


PIXEL_DISTORTIONS = {"blur": blur, "exposure": exposure, "noise": noise, "stutter": stutter}


def opinion(severities: dict[str, float], generator: torch.Generator) -> float:
    """The mean of `RATERS` opinions, 1..5; see the rule at the top of the file."""
    quality = math.prod(1 - IMPACT[name] * severity for name, severity in severities.items())
    noise_std = RATER_STD / math.sqrt(RATERS)
    return min(5.0, max(1.0, 1 + 4 * quality + noise_std * torch.randn((), generator=generator).item()))


def render(seed: int, split: str, index: int) -> Rendered:
    """Clip `index` of `split`: 12 % clean, 60 % with one distortion, 28 % with two."""
    generator = clip_generator(seed, split, index)
    draw = uniform(generator, 0, 1)
    count = 0 if draw < 0.12 else 1 if draw < 0.72 else 2
    names = sorted(IMPACT)
    while len(names) != count or set(names) in HIDDEN_PAIRS:
        order = torch.randperm(len(IMPACT), generator=generator).tolist()
        names = sorted(list(IMPACT)[k] for k in order[:count])
    severities = {name: round(uniform(generator, 0.1, 1.0), 3) for name in names}
    frames = scene(generator)
    for name, distort in PIXEL_DISTORTIONS.items():  # in the order of a camera: lens, sensor, then transport
        if name in severities:
            frames = distort(frames, severities[name], generator)
    crf = compression_crf(severities["compression"]) if "compression" in severities else CRF_CLEAN
    return Rendered(frames.clamp(0, 1), crf, severities, round(opinion(severities, generator), 3))


def write_mp4(frames: torch.Tensor, crf: int, path: str | os.PathLike) -> None:
    """Encode frames (T, 3, H, W) in [0, 1] as H.264, 4:2:0, with the same bytes every time.

    One thread: clips this small leave nothing to share. Without x264's assembly: with it the same frames give other
    bytes from time to time.
    """
    pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "asm=0"}
        stream.codec_context.thread_count = 1
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def write_clips(folder: str | os.PathLike, splits: dict[str, int] = SPLITS, seed: int = 0, progress=iter) -> Path:
    """Write the clips of every split and `labels.jsonl` into `folder`; returns the label file's path.

    The label file exists only if every clip does: the folder is filled under another name and renamed at the end.
    `progress` wraps the iterable of clips (tqdm, say).
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    clips = []
    for split, index in progress([(split, index) for split, count in splits.items() for index in range(count)]):
        path = f"{split}/{index:05d}.mp4"
        rendered = render(seed, split, index)
        (partial / split).mkdir(parents=True, exist_ok=True)
        write_mp4(rendered.frames, rendered.crf, partial / path)
        extra = {"severities": rendered.severities, "crf": rendered.crf}
        clips.append(Clip(path, rendered.mos, (1.0, 5.0), "synthetic", split, extra))
    write_labels(clips, partial / "labels.jsonl")
    partial.rename(folder)
    return folder / "labels.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to make; it must not exist")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other clips")
    for split, count in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"number of clips of split '{split}'")
    args = parser.parse_args()
    if Path(args.out).exists():
        parser.error(f"--out {args.out} exists already")
    print(write_clips(args.out, {split: getattr(args, split) for split in SPLITS}, args.seed))


if __name__ == "__main__":
    main()
