"""Text files that are there whole or not at all, and tables in them (CSV)."""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file, UTF-8, that takes the name `path` when it is whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        # A file name may be no UTF-8; its bytes are kept.
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    """All rows or none; None is an empty cell. Commas, quotes and line breaks in a cell are quoted."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
