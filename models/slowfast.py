"""SlowFast-R50: the frozen network whose one feature per video says how things move.

Feichtenhofer et al., "SlowFast Networks for Video Recognition" (ICCV 2019, arXiv 1812.03982), up to the average pools
and with them, under the parameter names of pytorchvideo's `slowfast_r50`. The slow path has few frames and many
channels, the fast path all frames and few channels. After the stems and after each stage but the last, the fast path's
features are fused into the slow path.

Legend: N videos, F frames, C channels, T time steps, H and W height and width in pixels.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.keys import compare

EXPANSION = 4  # channels of a residual block, in widths of its bottleneck
FUSION_STRIDE = 4  # in time, fast to slow; fixed in the network, whatever `slow_stride` is
SLOW_TIME_KERNELS = (1, 1, 3, 3)  # of each stage; the fast path has 3 in all

# How the released code's two recipes show frames to SlowFast: 6 of them in training, 12 in its test.
RECIPES = {"train": {"slow_stride": 3, "temporal_repeat": 6}, "test": {"slow_stride": 4, "temporal_repeat": 4}}

# For dense clips, which the released code does not have: as the public weights were trained, no time step repeated.
CLIPS = {"slow_stride": 4, "temporal_repeat": 1}

PUBLIC_URL = "https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/SLOWFAST_8x8_R50.pyth"


@dataclass(frozen=True)
class SlowFastConfig:
    """Sizes of the network and of its pools. The defaults are SlowFast-R50 as the released code trains with it.

    Args:
        slow_width, fast_width: channels of the two stems; bottlenecks begin with as many and double at each stage.
        depths: residual blocks of each stage; four stages at most.
        slow_stride: the slow path sees F // slow_stride frames, which the fusion needs to be F / 4, rounded up.
            Released code: 3 for its 6 frames in training, 4 for its 12 in testing.
        temporal_repeat: how often each time step counts in the pools. Released code: 6 in training, 4 in testing.
        pool_frames: time steps, repeats included, that the slow and the fast pool average at once.
        pool_side: their height and width, in cells of the last feature maps.

    Raises ValueError, naming the setting, for a value below 1 and for more than four stages.
    """

    slow_width: int = 64
    fast_width: int = 8
    depths: tuple[int, ...] = (3, 4, 6, 3)
    slow_stride: int = 3
    temporal_repeat: int = 6
    pool_frames: tuple[int, int] = (8, 32)
    pool_side: int = 7

    def __post_init__(self):
        for name in ("depths", "pool_frames"):  # lists, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, value in vars(self).items():
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if len(self.depths) > len(SLOW_TIME_KERNELS):
            raise ValueError(f"depths {self.depths}: at most {len(SLOW_TIME_KERNELS)} stages")

    @property
    def channels(self) -> int:
        """C of a video's feature: the slow path's channels, then the fast path's."""
        return (self.slow_width + self.fast_width) * EXPANSION * 2 ** (len(self.depths) - 1)

    @property
    def downsampling(self) -> int:
        """Pixels per cell of the last feature maps, in height and width."""
        return 2 ** (len(self.depths) + 1)  # stem: convolution and pool; every stage but the first

    @property
    def clip_frames(self) -> int:
        """Frames of a dense clip under the settings CLIPS: the fewest that fill both pools. 32 for SlowFast-R50."""
        slow, fast = self.pool_frames
        return FUSION_STRIDE * max(slow, -(-fast // FUSION_STRIDE))

    def check_input(self, frames: int, height: int, width: int) -> None:
        """Raise a ValueError that names the setting to change if videos of this size do not fit the network."""
        slow, fused = frames // self.slow_stride, -(-frames // FUSION_STRIDE) or 1
        if slow != fused:
            fitting = [f"slow_stride {stride}" for stride in range(1, frames + 1) if frames // stride == fused]
            raise ValueError(
                f"slow_stride {self.slow_stride}: of {frames} frames the slow path has {slow}, but fusion with the "
                f"fast path needs {fused}: use {' or '.join(fitting) or 'another number of frames'}"
            )
        for path, steps, window in zip(("slow", "fast"), (slow, frames), self.pool_frames):
            if steps * self.temporal_repeat < window:
                raise ValueError(
                    f"temporal_repeat {self.temporal_repeat}: {steps} frames of the {path} path make "
                    f"{steps * self.temporal_repeat} time steps, fewer than the {window} of pool_frames: "
                    f"use {-(-window // steps)} or more, or smaller pool_frames"
                )
        cells = -(-min(height, width) // self.downsampling)
        if cells < self.pool_side:
            raise ValueError(
                f"pool_side {self.pool_side}: the last feature maps of {height} x {width} pixels have a side of "
                f"{cells}: use {(self.pool_side - 1) * self.downsampling + 1} pixels or more, or a smaller pool_side"
            )


def check_watched(config: SlowFastConfig, frames: int, motion_clips: int, side: int) -> None:
    """Raise a ValueError if SlowFast cannot take what it would see of side x side pixels: the frames, or dense clips.

    It names --frames; with `motion_clips`, whose length follows from the network, --motion-clips.
    """
    shown, length = f"--frames {frames}", frames
    if motion_clips:
        shown, length = f"--motion-clips {motion_clips}", config.clip_frames
    try:
        config.check_input(length, side, side)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error


def slow_indices(frames: int, slow_stride: int) -> Tensor:
    """Which of F frames the slow path sees, (F // slow_stride,): evenly spread with both ends, as the released code."""
    return torch.linspace(0, frames - 1, frames // slow_stride, dtype=torch.float32).long()


def pool(features: Tensor, repeat: int, kernel: tuple[int, int, int]) -> Tensor:
    """(N, C, T, H, W) -> (N, C): each time step repeated, the average of every window, the average of those.

    The released code's avg_pool3d of stride 1 and then adaptive average, a dimension at a time.
    """
    features = features.repeat_interleave(repeat, dim=2)
    for size in kernel:
        features = features.unfold(2, size, 1).mean((2, -1))
    return features


def conv(
    channels_in: int, channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
) -> nn.Conv3d:
    """A convolution that changes sizes by its stride alone, with He initialisation."""
    layer = nn.Conv3d(channels_in, channels, kernel, stride, padding=[size // 2 for size in kernel], bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under the names that the checkpoints give them."""
    sequence = nn.Sequential()
    for name, layer in layers.items():
        sequence.add_module(name, layer)
    return sequence


def stem(width: int, time_kernel: int) -> nn.Sequential:
    return named(
        conv=conv(3, width, (time_kernel, 7, 7), (1, 2, 2)),
        norm=nn.BatchNorm3d(width),
        act=nn.ReLU(inplace=True),
        pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )


def fusion(fast_channels: int) -> nn.Sequential:
    """The fast path's features as the slow path takes them: twice the channels, a quarter of the time steps."""
    return named(
        conv_fast_to_slow=conv(fast_channels, 2 * fast_channels, (7, 1, 1), (FUSION_STRIDE, 1, 1)),
        norm=nn.BatchNorm3d(2 * fast_channels),
        act=nn.ReLU(inplace=True),
    )


class ResBlock(nn.Module):
    """A bottleneck (time, space, channels) beside a shortcut, projected in the `first` block of a stage."""

    def __init__(self, channels_in: int, width: int, time_kernel: int, stride: int, first: bool):
        super().__init__()
        channels, stride = EXPANSION * width, (1, stride, stride)
        self.branch1_conv = conv(channels_in, channels, (1, 1, 1), stride) if first else nn.Identity()
        self.branch1_norm = nn.BatchNorm3d(channels) if first else nn.Identity()
        self.branch2 = named(
            conv_a=conv(channels_in, width, (time_kernel, 1, 1)),
            norm_a=nn.BatchNorm3d(width),
            act_a=nn.ReLU(inplace=True),
            conv_b=conv(width, width, (1, 3, 3), stride),
            norm_b=nn.BatchNorm3d(width),
            act_b=nn.ReLU(inplace=True),
            conv_c=conv(width, channels, (1, 1, 1)),
            norm_c=nn.BatchNorm3d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.branch1_norm(self.branch1_conv(x)) + self.branch2(x))


def stage(channels_in: int, width: int, depth: int, time_kernel: int, stride: int) -> nn.Sequential:
    first = ResBlock(channels_in, width, time_kernel, stride, first=True)
    rest = [ResBlock(EXPANSION * width, width, time_kernel, 1, first=False) for _ in range(depth - 1)]
    return named(res_blocks=nn.Sequential(first, *rest))


class TwoPaths(nn.Module):
    """The stems, or a stage, of both paths, and the fusion after them, if any."""

    def __init__(self, slow: nn.Module, fast: nn.Module, fusion: nn.Module | None):
        super().__init__()
        self.multipathway_blocks = nn.ModuleList([slow, fast])
        self.multipathway_fusion = fusion

    def forward(self, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        slow, fast = (block(x) for block, x in zip(self.multipathway_blocks, (slow, fast)))
        if self.multipathway_fusion is not None:
            slow = torch.cat([slow, self.multipathway_fusion(fast)], dim=1)
        return slow, fast


class SlowFast(nn.Module):
    """One feature per video; frozen: no gradient, and always in evaluation mode.

    Its parameters are named `feature_extraction.{0..4}.*`, as in the released checkpoint after `slowfast_model.`.
    """

    def __init__(self, config: SlowFastConfig = SlowFastConfig()):
        super().__init__()
        self.config = config
        slow, fast, last = config.slow_width, config.fast_width, len(config.depths) - 1
        blocks = [TwoPaths(stem(slow, 1), stem(fast, 5), fusion(fast))]
        slow_in, fast_in = slow + 2 * fast, fast
        for k, (depth, slow_time_kernel) in enumerate(zip(config.depths, SLOW_TIME_KERNELS)):
            stride = 1 if k == 0 else 2
            slow_stage = stage(slow_in, slow, depth, slow_time_kernel, stride)
            fast_stage = stage(fast_in, fast, depth, 3, stride)
            fast_in = EXPANSION * fast
            slow_in = EXPANSION * slow + 2 * fast_in
            blocks.append(TwoPaths(slow_stage, fast_stage, fusion(fast_in) if k < last else None))
            slow, fast = 2 * slow, 2 * fast
        self.feature_extraction = nn.ModuleList(blocks)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SlowFast":
        """Evaluation mode, whatever is asked for: BatchNorm's statistics never change."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """(N, F, 3, H, W) frames, normalised as the ViT's, -> (N, C) features, slow path first, in the weights' dtype.

        Raises ValueError for sizes that do not fit the network (`SlowFastConfig.check_input`).
        """
        return self.features(frames)

    def features(self, frames: Tensor) -> Tensor:
        """What `forward` computes, with gradient, for a script that trains this network itself."""
        config, count = self.config, frames.shape[1]
        config.check_input(count, *frames.shape[3:])
        fast = frames.transpose(1, 2).to(next(self.parameters()).dtype)
        slow = fast[:, :, slow_indices(count, config.slow_stride)]
        for block in self.feature_extraction:
            slow, fast = block(slow, fast)
        pooled = [
            pool(features, config.temporal_repeat, (steps, config.pool_side, config.pool_side))
            for features, steps in zip((slow, fast), config.pool_frames)
        ]
        return torch.cat(pooled, dim=1)


# ---- weights


def load_released(model: SlowFast, weights: Mapping[str, Tensor]) -> None:
    """Load the released checkpoint's `slowfast_model.*`.

    Raises ValueError that lists each key that is missing, left over or of another shape; nothing is loaded then.
    """
    _load(model, weights, "slowfast_model.feature_extraction.", "slowfast_model")


def load_slowfast(file: str | os.PathLike, config: SlowFastConfig = SlowFastConfig()) -> SlowFast:
    """The network with the weights of pytorchvideo's SLOWFAST_8x8_R50.pyth, or of a .safetensors file of the same keys.

    Keys `blocks.{0..6}.*`; 5 and 6, the classifier, are not used. Nothing but tensors is unpickled. Raises ValueError
    naming --slowfast for a file that is missing, damaged or of another kind, and for keys as `load_released`.
    """
    source, path = f"--slowfast {file}", Path(file)
    if not path.is_file():
        raise ValueError(f"{source}: no such file: download {PUBLIC_URL} and give its path")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError
        weights = {name: value for name, value in weights.items() if not name.startswith(("blocks.5.", "blocks.6."))}
    except Exception as error:  # what a damaged pickle raises has no common class
        reason = f"neither .safetensors nor tensors under 'model_state' ({type(error).__name__})"
        raise ValueError(f"{source}: {reason}") from error
    model = SlowFast(config)
    _load(model, weights, "blocks.", source)
    return model


def _load(model: SlowFast, weights: Mapping[str, Tensor], prefix: str, source: str) -> None:
    own = {prefix + name: value.shape for name, value in model.feature_extraction.state_dict().items()}
    problems = compare({name: value.shape for name, value in weights.items()}, own)
    if problems:
        raise ValueError(f"{source}: {problems}")
    model.feature_extraction.load_state_dict({name.removeprefix(prefix): weights[name] for name in own})
