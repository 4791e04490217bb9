"""Folders that are whole or told to be damaged, and the state that continues a run.

    RUN/checkpoints/step_000100/   the model in transformers' format, optimizer.pt, state.json, manifest.json
    RUN/best/                      the model of the best validation so far, that validation as state.json, manifest.json

A folder is filled under a temporary name and renamed, so a save that is killed leaves the previous one as it was. The
manifest has the size and SHA-256 of every other file: safetensors and torch.load both read a flipped byte in silence.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

PARTIAL, REPLACED = ".partial", ".replaced"  # a folder that is being filled; one whose successor takes its name
STATE, MANIFEST = "state.json", "manifest.json"


class CannotResume(Exception):
    """A checkpoint that the run, as its flags are now, cannot go on from."""


# ---- folders


def write_folder(folder: Path, state: object, fill: Callable[[Path], None]) -> None:
    """Replace `folder` by what `fill(temporary folder)` writes, with `state`, a JSON value, and the manifest.

    Whatever is raised, or killed, on the way, the folder that was there is there still, or is after the next `tidy`.
    """
    temporary, replaced = folder.with_name(PARTIAL), folder.with_name(f".{folder.name}{REPLACED}")
    tidy(folder.parent)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        (temporary / STATE).write_text(json.dumps(state) + "\n")
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:  # rename may reach the disk before the data does
            sync(path)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        tidy(folder.parent)


def tidy(parent: Path) -> None:
    """Remove what an interrupted save in `parent` left half-written, and put back what it was about to replace."""
    shutil.rmtree(parent / PARTIAL, ignore_errors=True)
    for replaced in parent.glob(f".*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = {str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (folder / MANIFEST).write_text(json.dumps(rows, indent=2) + "\n")


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: Path) -> str | None:
    """The first file of `folder` that is not as it was written, and what is wrong with it; None if all are intact.

    A folder without a manifest, as older versions wrote them, counts as damaged: nothing vouches for it.
    """
    name = MANIFEST
    try:
        for name, row in json.loads((folder / MANIFEST).read_text()).items():
            size = (folder / name).stat().st_size
            if size != row["size"]:
                return f"{name}: size {size}, not {row['size']}"
            if sha256(folder / name) != row["sha256"]:
                return f"{name}: sha256 differs"
    except OSError as error:
        return f"{name}: {error.strerror}"
    except (ValueError, AttributeError, TypeError, KeyError):
        return f"{MANIFEST}: not a manifest"
    return None


# ---- checkpoints


def step_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, damaged or not, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdecimal())


def save_checkpoint(run: Path, state: dict, save_model: Callable[[Path], None], optimizer: dict, keep: int) -> None:
    """Write `checkpoints/step_{state["step"]}`; of all others only the `keep` - 1 before it stay.

    `optimizer` is its whole state.
    """

    def fill(folder: Path) -> None:
        save_model(folder)
        torch.save(optimizer, folder / "optimizer.pt")

    folder = run / "checkpoints" / f"step_{state['step']:06d}"
    write_folder(folder, state, fill)
    kept = [other for other in step_folders(run) if other <= folder][-keep:]
    for other in set(step_folders(run)).difference(kept):  # a later one is damaged, or the run would have begun there
        shutil.rmtree(other)


def find_checkpoint(resume: str | None, run: Path, tell: Callable[[str], None]) -> Path | None:
    """The folder that `--resume` means: None without the flag; for 'auto' the newest intact one of `run`, or None if
    `run` has no checkpoint at all. What was damaged and newer is told, a line each.

    For one process at a time: it tidies the run. Raises ValueError naming --resume for a folder that is damaged or not
    a checkpoint, for one that `run` has gone on from, and if all checkpoints of `run` are damaged.
    """
    if resume is None:
        return None
    tidy(run)
    tidy(run / "checkpoints")
    folders = step_folders(run)
    if resume == "auto":
        for folder in reversed(folders):
            wrong = damage(folder)
            if wrong is None:
                return folder
            tell(f"{folder} is damaged and passed over: {wrong}")
        if folders:
            raise ValueError(f"--resume auto: all checkpoints in {run / 'checkpoints'} are damaged")
        return None
    folder = Path(resume)
    for name in (STATE, "optimizer.pt", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"--resume {resume}: not a checkpoint, it has no {name}")
    if wrong := damage(folder):
        raise ValueError(f"--resume {resume}: damaged: {wrong}")
    if folders and folders[-1].name > folder.name:
        raise ValueError(
            f"--resume {resume}: {run} has gone on to {folders[-1].name}; "
            "choose another folder with --output, or delete the later checkpoints"
        )
    return folder


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint; its `step` is the number of updates done."""
    return json.loads((folder / STATE).read_text())


def read_best(run: Path, tell: Callable[[str], None]) -> dict | None:
    """The validation of the model in best/: None if there is none, or if it is damaged, which is told in a line."""
    folder = run / "best"
    if not folder.exists():
        return None
    if wrong := damage(folder):
        tell(f"{folder} is damaged and will be replaced: {wrong}")
        return None
    return read_state(folder)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer, which takes to its device what it needs; the file holds tensors and plain values alone.

    Raises CannotResume naming --resume if its state is of other parameters.
    """
    state = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CannotResume(f"--resume {folder}: {error}") from error
