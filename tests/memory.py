"""Bytes of all tensors alive, and the most there were: what `torch.cuda.max_memory_allocated` says, on any device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storage of every tensor that an operation returns, until it is freed; views count once.

    `now` and `peak` are bytes; `known` tensors (a model's, say) are counted from the start.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def restart(self) -> None:
        """Measure a new peak from here."""
        self.peak = self.now
