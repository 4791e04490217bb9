"""What a run writes down as it goes: JSON lines, and where the time of each step went."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from grpo import distributed


class JsonLines(AbstractContextManager):
    """A file of one JSON object a line, each with a `step`; processes other than the main one write nothing.

    Opened for a run that has done `done` steps, it keeps the lines up to there, so no step is written twice. A thread
    writes, in order, so a slow disk holds up only `flush` and the end of a `with`; what waits stays in memory, without
    bound. A failure is raised once, by the next call; nothing is written after it, as the last line may be torn.
    """

    def __init__(self, path: Path, done: int):
        self.path, self.whole = path, True
        self.thread = ThreadPoolExecutor(max_workers=1)  # starts with the first write; the interpreter's exit waits too
        self.waiting: deque[Future] = deque()
        if distributed.is_main():
            kept = path.with_name(f".{path.name}.partial")
            with kept.open("wb") as file:
                file.writelines(line for line in self._lines() if json.loads(line)["step"] <= done)
            kept.replace(path)  # at once: a run that is killed here can be resumed again

    def rows(self) -> list[dict]:
        """What is in the file by now; nothing in processes other than the main one."""
        self.flush()
        return [json.loads(line) for line in self._lines()] if distributed.is_main() else []

    def write(self, rows: Iterable[dict]) -> None:
        """Hand over the rows and return; they are encoded by then and may be changed.

        Raises ValueError for what JSON cannot hold, NaN say, and the OSError of earlier rows that could not be written.
        """
        if distributed.is_main():
            lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
            while self.waiting and self.waiting[0].done():
                self.waiting.popleft().result()
            self.waiting.append(self.thread.submit(self._append, lines))

    def flush(self) -> None:
        """Wait until every row is in the file. Raises the OSError of rows that could not be written."""
        while self.waiting:
            self.waiting.popleft().result()

    def __exit__(self, *_) -> None:
        self.thread.shutdown()
        self.flush()

    def _lines(self) -> Iterator[bytes]:
        """Those that were finished, one at a time: a long run's rollouts.jsonl has gigabytes."""
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from (line for line in file if line.endswith(b"\n"))

    def _append(self, lines: bytes) -> None:
        if self.whole:
            self.whole = False
            with self.path.open("ab") as file:
                file.write(lines)
            self.whole = True


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
