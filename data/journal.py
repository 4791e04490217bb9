"""Rows on the disk as soon as they are made, so that a job that is killed goes on where it was.

    FOLDER/settings.json           what the rows depend on; a job with other settings is refused
    FOLDER/partial.rank0.jsonl     the rows of one process, a JSON object a line, until the job is done

Which process made a row does not matter to whoever reads it.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.tables import replacing

SETTINGS, PARTIAL = "settings.json", "partial.rank{}.jsonl"


def check(folder: Path, settings: dict) -> None:
    """Raise ValueError naming what differs if `folder` holds rows of other settings (JSON values by name).

    And for one that holds other things, which are not to be mixed with rows.
    """
    file = folder / SETTINGS
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files and no {SETTINGS}: no evaluation; choose another folder")
        return
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    pairs = {name: (saved.get(name), settings.get(name)) for name in [*settings, *(saved.keys() - settings)]}
    changes = [f"{name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now]
    if changes:
        raise ValueError(f"{folder} holds another evaluation: {'; '.join(changes)}; choose another folder or remove it")


def begin(folder: Path, settings: dict) -> None:
    """Make the folder, if there is none, and note down what its rows depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SETTINGS) as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def read_rows(folder: Path) -> list[dict]:
    """The rows of all processes, each one's in the order they were made. A line that was never finished is left out."""
    files = sorted(folder.glob(PARTIAL.format("*")))
    return [json.loads(line) for file in files for line in file.read_bytes().split(b"\n")[:-1]]


@contextmanager
def appending(folder: Path, rank: int) -> Iterator[Callable[[dict], None]]:
    """A function that adds a row to this process's file; it is with the system when the function returns."""
    with open(folder / PARTIAL.format(rank), "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # behind the last newline is what a killed process left

        def write(row: dict) -> None:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()

        yield write


def remove_partial(folder: Path) -> None:
    for file in folder.glob(PARTIAL.format("*")):
        file.unlink()


def remove(folder: Path) -> None:
    """The whole journal, folder and all."""
    remove_partial(folder)
    (folder / SETTINGS).unlink()
    folder.rmdir()
