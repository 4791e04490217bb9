"""Weights by a rule from their keys: those from which the released network's numbers were computed."""

import hashlib
from math import prod

import torch
from torch import Tensor


def fill(name: str, shape) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_var"):
        return 1 + 0.1 * normal.abs()
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.02 * normal
    return normal * (2 / prod(shape[1:])) ** 0.5 if len(shape) == 5 else 0.05 * normal
