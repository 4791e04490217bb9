"""Work that repeats, as a CUDA graph: launched by one call in place of one for each of its kernels."""

from collections.abc import Callable

import torch


class Recorded:
    """Call after call of `work`, which changes tensors in place: the same shapes each time, nothing read back.

    The first call runs it, the second records and runs it, later ones repeat what was recorded. Other threads may use
    the device meanwhile: the loader's, which pins memory, and NCCL's. Raises CUDA's RuntimeError in the second call if
    the work cannot be recorded.
    """

    def __init__(self, work: Callable[[], None]):
        self.work, self.graph, self.warm = work, None, False

    def __call__(self) -> None:
        if not self.warm:
            self.work()
            self.warm = True
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.work()
        self.graph.replay()
