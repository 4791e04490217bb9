"""Label files: one JSON object a line, one line a clip. Needs no torch, so labels can be checked before it loads."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

REQUIRED = ("path", "mos", "mos_range", "dataset", "split")


@dataclass(frozen=True)
class Clip:
    """One labelled video.

    `path` is relative to the video folder; `mos` is the mean opinion score on the dataset's own scale `mos_range`
    (low, high); `extra` holds every other key of the label line.
    """

    path: str
    mos: float
    mos_range: tuple[float, float]
    dataset: str
    split: str
    extra: dict = field(default_factory=dict, hash=False)

    @property
    def target(self) -> float:
        """The MOS mapped linearly from `mos_range` to the 1..5 scale that the prompt asks for.

        >>> Clip("a.mp4", mos=50.0, mos_range=(0.0, 100.0), dataset="LSVQ", split="train").target
        3.0
        """
        low, high = self.mos_range
        return 1 + 4 * (self.mos - low) / (high - low)


def read_labels(file: str | Path, split: str | None = None) -> list[Clip]:
    """The clips of a label file in file order, or those of one split. Every line is checked, whatever the split.

    Raises ValueError: `FILE:LINE: ...` for the first line that breaks a rule of docs/data.md, `--labels FILE ...` for
    a file that cannot be read or has no such clip.
    """
    try:
        lines = Path(file).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"--labels {file} cannot be read: {error.strerror}") from error

    clips: list[Clip] = []
    seen: dict[PurePath, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            clip = _parse(line)
            first = seen.setdefault(PurePath(clip.path), number)
            if first != number:
                raise ValueError(f"path {clip.path!r} is already on line {first}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: {error}") from error
        clips.append(clip)

    chosen = [clip for clip in clips if split in (None, clip.split)]
    if not clips:
        raise ValueError(f"--labels {file} has no clip")
    if not chosen:
        found = ", ".join(sorted({clip.split for clip in clips}))
        raise ValueError(f"--labels {file} has no clip with split {split!r} (splits found: {found})")
    return chosen


def write_labels(clips: Iterable[Clip], file: str | Path) -> None:
    """Write clips so that `read_labels` gives them back."""
    with open(file, "w", encoding="utf-8", newline="\n") as out:
        for clip in clips:
            entry = {key: getattr(clip, key) for key in REQUIRED} | clip.extra
            out.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")


def missing_videos(clips: Iterable[Clip], root: str | Path) -> list[Clip]:
    """The clips with no file under `root`: the caller counts them.

    Raises ValueError naming --videos when `root` is no folder or holds none of the files: then the flag is wrong,
    not the data.
    """
    root, clips = Path(root), list(clips)
    if not root.is_dir():
        raise ValueError(f"--videos {root} is not a folder")
    missing = [clip for clip in clips if not os.path.exists(root / clip.path)]
    if clips and len(missing) == len(clips):
        raise ValueError(f"--videos {root} has none of the {len(clips)} labelled files (first: {clips[0].path})")
    return missing


def _parse(line: bytes) -> Clip:
    if line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("starts with a byte order mark (BOM); save the file as UTF-8 without one")
    try:
        entry = json.loads(line.decode(), parse_constant=_not_json)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    if absent := [key for key in REQUIRED if key not in entry]:
        raise ValueError(f"no {', '.join(absent)}")
    path, mos, mos_range, dataset, split = (entry.pop(key) for key in REQUIRED)

    _check_path(path)
    for key, value in (("dataset", dataset), ("split", split)):
        if not (isinstance(value, str) and value):
            raise ValueError(f"{key} must be a text, got {value!r}")
    if not (isinstance(mos_range, list) and len(mos_range) == 2 and all(map(_is_number, mos_range))):
        raise ValueError(f"mos_range must be [low, high], two numbers, got {mos_range!r}")
    low, high = map(float, mos_range)
    if not low < high:
        raise ValueError(f"mos_range must have low < high, got {mos_range!r}")
    if not _is_number(mos):
        raise ValueError(f"mos must be a number, got {mos!r}")
    if not low <= mos <= high:
        raise ValueError(f"mos {mos} is outside mos_range {mos_range}")
    return Clip(path, float(mos), (low, high), dataset, split, extra=entry)


def _check_path(path: object) -> None:
    if not (isinstance(path, str) and path and "\0" not in path):
        raise ValueError(f"path must be a file name, got {path!r}")
    path.encode()  # JSON's \ud800 makes a text that no file system and no CSV file takes
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"path must stay under the video folder, got {path!r}")


def _is_number(value: object) -> bool:
    """A finite int or float. `True` is an int to Python and 1e400 is inf; neither is a score."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def _not_json(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")
