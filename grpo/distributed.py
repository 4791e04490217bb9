"""The only importer of torch.distributed. Every helper is the identity in a run of one process.

`torchrun --nproc-per-node K train.py` starts K processes; each takes an equal share of the step's videos. Ranks meet in
four places: the gather of ranking statistics, the sums that normalise the loss, the gradients (DDP) and the metrics.
What is too large for one of them they share, by rows, as torch's DTensors: each rank keeps 1 / K of every tensor.
"""

import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

VERBS = ("watch", "encode", "sample", "greedy")  # what computes with a policy's parameters, besides its forward

# What tells DDP not to send buffers around in every pass: its argument's name in torch 2.15, and before.
NEW_NAME, OLD_NAME = "forward_sync_buffers", "broadcast_buffers"

T = TypeVar("T")

MEET_POLL_S = 0.05
ROLL_CALL_S = 10.0  # how long a process that is asked whether it is there may take
_roll_call_group: dist.ProcessGroup | None = None  # apart, so that no error has touched it when it is needed


class LostProcess(Exception):
    """A process that has died or hangs; the text says which, as far as torch can tell."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def restarts() -> int:
    """How often torchrun has begun the processes anew, since one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def max_restarts() -> int:
    """How often torchrun would do so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def setup(device: str, timeout_s: float = 600.0) -> torch.device:
    """Join the other processes, if any; returns this process's device for 'auto', 'cpu' or 'cuda'.

    timeout_s: seconds that one process waits for another, from now on.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() > 1:
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(meet(store, rank(), world_size(), timeout_s), store)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank(), world_size=world_size())
        global _roll_call_group
        _roll_call_group = dist.new_group(backend="gloo")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this start of the processes, the same in all of them and new in each start.

    torchrun keeps the store when it begins anew, with all that the start before has left in it; and of several nodes
    only the one whose process failed counts that as a restart. So process 0 makes up a name, and the others take none
    before it has answered to the number that they drew.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        store.set("start", own)
        for other in range(1, world_size):
            store.set(f"{own} {store.get(f'{own} {other}').decode()}", "welcome")
        return own
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start} {rank}", own)
        if store.check([f"{start} {own}"]):
            return start
        time.sleep(MEET_POLL_S)
    raise TimeoutError(f"process {rank} has waited {timeout_s:g} s for process 0")


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_processes_told() -> Iterator[None]:
    """Raises LostProcess for an error of a collective, after a roll call. Its text is told here, by every process that
    is left: the main one may be lost.

    NCCL seldom lets a process get this far: it ends those that have waited too long, and says so.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            raise
        lost = LostProcess(f"process {rank()} lost touch with the others: {roll_call()} ({error})")
        print(f"\nerror: {lost}", file=sys.stderr, flush=True)
        raise lost from error


def roll_call() -> str:
    """Which other processes have ended; if none has, which do not answer within ROLL_CALL_S seconds."""
    begun = time.monotonic()

    def ask(other: int) -> str:
        try:
            sent = dist.isend(torch.ones(1), other, _roll_call_group)
            dist.irecv(torch.empty(1), other, _roll_call_group).wait(timedelta(seconds=ROLL_CALL_S))
            sent.wait()
            return "answered"
        except RuntimeError:
            return "no answer" if time.monotonic() - begun >= ROLL_CALL_S else "ended"

    others = [other for other in range(world_size()) if other != rank()]
    with ThreadPoolExecutor(len(others)) as pool:  # all at once, for a wait that is in vain breaks the group
        found = dict(zip(others, pool.map(ask, others)))
    for state in ("ended", "no answer"):
        if state in found.values():
            return f"{state}: process " + ", ".join(str(other) for other in others if found[other] == state)
    return "all answer"


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_main(call: Callable[[], T], device: torch.device) -> T:
    """What `call` returns in the main process, which alone calls it, in all; JSON. A ValueError is raised in all."""
    rows = []
    if is_main():
        try:
            rows = [{"result": call()}]
        except ValueError as error:
            rows = [{"error": str(error)}]
    (row,) = gather_rows(rows, device)
    if "error" in row:
        raise ValueError(row["error"])
    return row["result"]


def wrap(policy: nn.Module) -> nn.Module:
    """The policy as a module whose gradients are averaged over processes; rank 0's parameters are sent to all.

    Gradients live in the buckets that travel, not beside them. Buffers never change. One that `shard` has been given
    is returned as it is.
    """
    if world_size() == 1 or isinstance(policy, FSDPModule):
        return policy
    sync_buffers = NEW_NAME if NEW_NAME in signature(DistributedDataParallel).parameters else OLD_NAME
    return DistributedDataParallel(policy, gradient_as_bucket_view=True, **{sync_buffers: False})


def accumulate(module: nn.Module, last: bool):
    """Context of one micro-batch: DDP's gradients travel once per step, with its last micro-batch.

    Those of a sharded policy travel with each, so that no rank ever holds them all.
    """
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


def shard(policy: nn.Module, layers: Iterable[nn.Module], compute: torch.dtype | None = None) -> nn.Module:
    """The policy, its parameters shared by all ranks (FSDP2); rank 0's are the ones that count.

    `forward` and the VERBS gather one of the `layers` at a time, and what is in none of them for the whole pass.
    Parameters that are frozen by now stay whole on every rank, and are not touched.

    Args:
        compute: dtype to gather parameters in, the gradients being summed in float32; None for the parameters' own.
    """
    if world_size() == 1:
        return policy
    for parameter in policy.parameters():
        dist.broadcast(parameter.detach(), src=0)
    precision = MixedPrecisionPolicy(compute, compute and torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh(), "mp_policy": precision, "reshard_after_forward": True}
    frozen = {parameter for parameter in policy.parameters() if not parameter.requires_grad}
    for module in (*layers, policy):
        fully_shard(module, ignored_params=frozen, **options)
    for verb in VERBS:
        register_fsdp_forward_method(policy, verb)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views as outputs: nothing here changes them in place
    return policy


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """While it lasts a sharded policy is whole on every rank: what they compute, and how long, may differ."""
    modules = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (world_size(),))


def share(x: Tensor) -> Tensor:
    """Of a tensor (n, ...) that is the same on all ranks, this one's ceil(n / world_size) rows or fewer, as a DTensor.

    They are the rows that `shard` would give it, and where `x` is on the device they stay in its memory.
    """
    if world_size() == 1:
        return x
    rows = x.chunk(world_size())
    own = rows[rank()] if rank() < len(rows) else x[:0]
    return DTensor.from_local(own, mesh(), [Shard(0)], shape=x.shape, stride=x.stride())


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` as `like` is: whole, or this rank's share of it. All ranks call it; what travels has the dtype of `like`."""
    if isinstance(like, DTensor):
        return x if isinstance(x, DTensor) else share(x)
    return x.to(like.dtype).full_tensor() if isinstance(x, DTensor) else x


def whole(state: Any) -> Any:
    """A tree of dicts and lists with its shared tensors put together on rank 0, on the CPU, and None on other ranks.

    All ranks call it. What is not shared stays what it is.
    """
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if is_main() else None


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients, shared ones too, to a norm of `largest` at most; returns what it was, the same on all ranks."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(parameters)
    clip_grads_with_norm_(parameters, largest, norm)
    return norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the gradients that there are, shared ones too; the same on all ranks, which all call it."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
