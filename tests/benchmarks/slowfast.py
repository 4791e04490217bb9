"""CPU time of `models.slowfast`, beside the same network as functional calls that walk over its weights by name.

    python -m tests.benchmarks.slowfast
    python -m tests.benchmarks.slowfast --frames 6 --size 448 --rounds 5

One process, one thread; a round runs both in turn, after a first one that does not count. Prints JSON: the median CPU
seconds of each, and of each round's ratio the median, the lowest and the highest.
"""

import argparse
import json
import time
from collections.abc import Mapping
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from models.slowfast import SlowFast, SlowFastConfig


def plain_features(weights: Mapping[str, Tensor], slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
    """Last feature maps of both paths from their frames (N, 3, T, H, W), by `feature_extraction.*` weights."""

    def conv_norm(x: Tensor, conv: str, norm: str, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        x = F.conv3d(x, kernel, stride=stride, padding=[size // 2 for size in kernel.shape[2:]])
        statistics = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=1e-5)

    def stem(x: Tensor, name: str) -> Tensor:
        x = F.relu_(conv_norm(x, f"{name}.conv", f"{name}.norm", (1, 2, 2)))
        return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))

    def res_block(x: Tensor, name: str, stride: tuple[int, int, int]) -> Tensor:
        shortcut = x
        if f"{name}.branch1_conv.weight" in weights:
            shortcut = conv_norm(x, f"{name}.branch1_conv", f"{name}.branch1_norm", stride)
        name = f"{name}.branch2"
        x = F.relu_(conv_norm(x, f"{name}.conv_a", f"{name}.norm_a"))
        x = F.relu_(conv_norm(x, f"{name}.conv_b", f"{name}.norm_b", stride))
        return F.relu_(shortcut + conv_norm(x, f"{name}.conv_c", f"{name}.norm_c"))

    def stage(x: Tensor, name: str, stride: tuple[int, int, int]) -> Tensor:
        block = 0
        while f"{name}.res_blocks.{block}.branch2.conv_a.weight" in weights:
            x = res_block(x, f"{name}.res_blocks.{block}", (1, 1, 1) if block else stride)
            block += 1
        return x

    def fuse(slow: Tensor, fast: Tensor, name: str) -> Tensor:
        return torch.cat([slow, F.relu_(conv_norm(fast, f"{name}.conv_fast_to_slow", f"{name}.norm", (4, 1, 1)))], 1)

    root, k = "feature_extraction", 0
    slow, fast = (stem(x, f"{root}.0.multipathway_blocks.{path}") for path, x in enumerate((slow, fast)))
    while f"{root}.{k}.multipathway_fusion.norm.weight" in weights:
        slow, k = fuse(slow, fast, f"{root}.{k}.multipathway_fusion"), k + 1
        stride = (1, 1, 1) if k == 1 else (1, 2, 2)
        slow, fast = (stage(x, f"{root}.{k}.multipathway_blocks.{path}", stride) for path, x in enumerate((slow, fast)))
    return slow, fast


@torch.no_grad()
def plain_forward(weights: Mapping[str, Tensor], frames: Tensor, slow_index: list[int]) -> Tensor:
    fast = frames.transpose(1, 2)
    features = plain_features(weights, fast[:, :, slow_index], fast)
    repeated = (x.repeat_interleave(6, dim=2) for x in features)
    pooled = (F.avg_pool3d(x, kernel, stride=1) for x, kernel in zip(repeated, ((8, 7, 7), (32, 7, 7))))
    return torch.cat([F.adaptive_avg_pool3d(x, 1).flatten(1) for x in pooled], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--size", type=int, default=224, help="frame side in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, frames = SlowFast(SlowFastConfig()), torch.randn(1, args.frames, 3, args.size, args.size)
    weights = model.state_dict()
    slow_index = torch.linspace(0, args.frames - 1, args.frames // 3).long().tolist()
    ways = {"models.slowfast": lambda: model(frames), "plain": lambda: plain_forward(weights, frames, slow_index)}

    taken, results = {name: [] for name in ways}, {}
    for _ in range(1 + args.rounds):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            taken[name].append(time.process_time() - start)
    torch.testing.assert_close(*results.values(), rtol=1e-4, atol=1e-4)

    taken = {name: seconds[1:] for name, seconds in taken.items()}
    ratios = [ours / plain for ours, plain in zip(*taken.values())]
    report = {f"{name}, CPU s": round(median(seconds), 3) for name, seconds in taken.items()}
    spread = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    print(json.dumps(report | {name: round(value, 3) for name, value in spread.items()}))


if __name__ == "__main__":
    main()
