"""The numbers of metrics.jsonl as TensorBoard reads them, with --tensorboard."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from grpo import distributed
from grpo.config import Config
from grpo.curves import scalars

QUEUE = 100_000  # numbers that wait for the disk before a step does


def check_installed() -> None:
    """Raise a ValueError naming --tensorboard if the package is not there."""
    if find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: needs tensorboard: pip install 'vqathinker[tensorboard]'")


class Events(AbstractContextManager):
    """Event files in a folder; none without --tensorboard, and none of processes other than the main one.

    Opened for a run that has done `done` steps: TensorBoard forgets what earlier files have of later ones. A thread of
    the package writes.
    """

    def __init__(self, folder: Path, done: int, config: Config):
        self.settings, self.writer = asdict(config), None
        if config.tensorboard and distributed.is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=done + 1, max_queue=QUEUE)

    def write(self, rows: Iterable[Mapping]) -> None:
        """Hand over the `scalars` of lines of metrics.jsonl, but for those that are undefined."""
        for row in rows if self.writer else ():
            for name, value in scalars(row, self.settings).items():
                if value is not None:
                    self.writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Wait until all is in the file."""
        if self.writer:
            self.writer.flush()

    def __exit__(self, *_) -> None:
        if self.writer:
            self.writer.close()
