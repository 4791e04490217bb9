"""What a run writes down as it goes: JSON lines, and where the time of each step went."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo import distributed


class JsonLines:
    """A file of one JSON object a line, each with a `step`; processes other than the main one write nothing.

    Opened for a run that has done `done` steps, it keeps the lines up to there, so no step is written twice.
    """

    def __init__(self, path: Path, done: int):
        self.file = None
        if not distributed.is_main():
            return
        # Behind the last newline there is nothing, or a line that was never finished.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        self.file = path.open("w", encoding="utf-8")
        self.file.writelines(line + "\n" for line in lines if json.loads(line)["step"] <= done)
        self.file.flush()

    def write(self, rows: Iterable[dict]) -> None:
        if self.file is not None:
            self.file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            self.file.flush()


class Phases:
    """Seconds spent in each named phase since the last `take`."""

    def __init__(self, synchronize: Callable[[], None] | None = None):
        self.seconds: dict[str, float] = {}
        self.synchronize = synchronize or (lambda: None)  # waits for the device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            self.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken
