"""Checkpoint folders that are either whole or absent, and the state that continues a run.

    RUN/checkpoints/step_000100/   the model in transformers' format, optimizer.pt, state.json
    RUN/best/                      the model of the best validation so far, in transformers' format

A folder is filled under a temporary name and renamed, so an interrupted save leaves the previous one as it was.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch


class CannotResume(Exception):
    """A checkpoint that the run, as its flags are now, cannot go on from."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace `folder` by what `fill(temporary folder)` writes: one rename, and one before it if there was a folder."""
    temporary, old = (folder.with_name(f".{folder.name}.{name}") for name in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    temporary.mkdir(parents=True)
    fill(temporary)
    for path in [*temporary.rglob("*"), temporary]:  # rename may reach the disk before the data does
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def step_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if (path / "state.json").is_file())


def save_checkpoint(run: Path, state: dict, save_model: Callable[[Path], None], optimizer: dict, keep: int) -> None:
    """Write `checkpoints/step_{state["step"]}` and delete all but the newest `keep`; `state` holds JSON values.

    `optimizer` is its whole state.
    """

    def fill(folder: Path) -> None:
        save_model(folder)
        torch.save(optimizer, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(state) + "\n")

    write_folder(run / "checkpoints" / f"step_{state['step']:06d}", fill)
    for old in step_folders(run)[:-keep]:
        shutil.rmtree(old)


def find_checkpoint(resume: str | None, run: Path) -> Path | None:
    """The folder that `--resume` means: None without the flag; for 'auto' the newest of the run, None if it has none.

    Raises ValueError naming --resume for a folder that is not a checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        return max(step_folders(run), default=None)
    folder = Path(resume)
    for name in ("state.json", "optimizer.pt", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"--resume {resume}: not a checkpoint, it has no {name}")
    return folder


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint; its `step` is the number of updates done."""
    return json.loads((folder / "state.json").read_text())


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer, which takes to its device what it needs; the file holds tensors and plain values alone.

    Raises CannotResume naming --resume if its state is of other parameters.
    """
    state = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CannotResume(f"--resume {folder}: {error}") from error
