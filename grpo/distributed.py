"""The only importer of torch.distributed. Every helper is the identity in a run of one process.

`torchrun --nproc-per-node K train.py` starts K processes; each takes an equal share of the step's videos. Ranks meet in
four places: the gather of ranking statistics, the sums that normalise the loss, the gradients (DDP) and the metrics.
"""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def setup(device: str) -> torch.device:
    """Join the other processes, if any; returns this process's device for 'auto', 'cpu' or 'cuda'."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_main(call: Callable[[], T], device: torch.device) -> T:
    """What `call`, which only the main process calls, returns there, in all of them; a ValueError is raised in all."""
    result = None
    if is_main():
        try:
            result = call()
        except ValueError as error:
            result = error
    if world_size() > 1:
        box = [result]
        dist.broadcast_object_list(box, device=device)
        (result,) = box
    if isinstance(result, ValueError):
        raise result
    return result


def wrap(policy: nn.Module) -> nn.Module:
    """The policy as a module whose gradients are averaged over processes; rank 0's parameters are sent to all.

    Gradients live in the buckets that travel, not beside them. Buffers never change.
    """
    if world_size() == 1:
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True, broadcast_buffers=False)


def accumulate(module: nn.Module, last: bool):
    """Context of one micro-batch: gradients travel once per step, with its last micro-batch."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


def gather(x: Tensor) -> Tensor:
    """Concatenate equally shaped tensors (n, ...) of all ranks, in rank order: (world_size * n, ...)."""
    if world_size() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def total(x: Tensor) -> Tensor:
    """Sum over ranks; `x` itself is not changed."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def total_of_each(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum each named number over ranks; the names must be the same everywhere."""
    summed = total(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, summed.tolist()))


def gather_rows(rows: list[dict], device: torch.device) -> list[dict]:
    """The JSON-able rows of all ranks, in rank order; they travel as UTF-8 text in tensors."""
    if world_size() == 1:
        return rows
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    sizes = gather(torch.tensor([len(text)], device=device)).tolist()
    padded = text.new_zeros(max(sizes))
    padded[: len(text)] = text
    parts = gather(padded).view(world_size(), -1).cpu().numpy()
    return [row for part, size in zip(parts, sizes) for row in json.loads(part[:size].tobytes())]
