"""Label files: one JSON object a line, one line a clip. Needs no torch, so labels can be checked before it loads.

`python -m data.labels` converts the field's other label files to this one, and checks label files; see docs/data.md.
"""

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.label_formats import FORMATS, REQUIRED, misfits, read_rows

MAPPINGS = ("linear", "released")


@dataclass(frozen=True)
class Clip:
    """One labelled video.

    `path` is relative to the video folder; `mos` is the mean opinion score on the dataset's own scale `mos_range`
    (low, high); `extra` holds every other key of the label line; `mapping`, one of MAPPINGS, says how `target` is made.
    Raises ValueError naming --mos-mapping for a mapping that is not known or cannot take this range.
    """

    path: str
    mos: float
    mos_range: tuple[float, float]
    dataset: str
    split: str
    extra: dict = field(default_factory=dict, hash=False)
    mapping: str = "linear"

    def __post_init__(self) -> None:
        if self.mapping not in MAPPINGS:
            raise ValueError(f"--mos-mapping {self.mapping}: choose one of {', '.join(MAPPINGS)}")
        if self.mapping == "released" and self.mos_range[0] != 0:
            raise ValueError(f"--mos-mapping released needs a mos_range that starts at 0, got {list(self.mos_range)}")

    @property
    def target(self) -> float:
        """The MOS on the scale that the prompt asks for.

        `linear`: from `mos_range` to 1..5. `released`: 5 mos / high, so that 0..100 gives MOS / 20, the scale that the
        labels of the released training list seem to have (inferred from three samples of it); for reproduction only.

        >>> Clip("a.mp4", mos=50.0, mos_range=(0.0, 100.0), dataset="LSVQ", split="train").target
        3.0
        """
        low, high = self.mos_range
        if self.mapping == "released":
            return 5 * self.mos / high
        return 1 + 4 * (self.mos - low) / (high - low)


def read_labels(file: str | Path, split: str | None = None, mapping: str = "linear") -> list[Clip]:
    """The clips of a label file in file order, or those of one split. Every line is checked, whatever the split.

    Raises ValueError: `FILE:LINE: ...` for the first line that breaks a rule of docs/data.md or that `mapping` cannot
    take, with the command that converts the file if it is in another known format; `--labels FILE ...` for a file that
    cannot be read or has no such clip.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--labels {file} cannot be read: {error.strerror}") from error
    rows, faults = read_rows("project", content)
    if faults:
        place, reason, _ = faults[0]
        other = next((name for name, misfit in misfits(content).items() if misfit is None and name != "project"), None)
        if other and not rows:
            raise ValueError(f"--labels {file}:{place}: {_conversion(Path(file), other)}")
        raise ValueError(f"{file}:{place}: {reason}")

    clips = []
    for row in rows:
        try:
            clips.append(Clip(row.path, row.mos, row.mos_range, row.dataset, row.split, row.extra, mapping))
        except ValueError as error:
            raise ValueError(f"{file}:{row.place}: {error}") from error
    if not clips:
        raise ValueError(f"--labels {file} has no clip")
    chosen = [clip for clip in clips if split in (None, clip.split)]
    if not chosen:
        found = ", ".join(sorted({clip.split for clip in clips}))
        raise ValueError(f"--labels {file} has no clip with split {split!r} (splits found: {found})")
    return chosen


def write_labels(clips: Iterable[Clip], file: str | Path) -> None:
    """Write clips so that `read_labels` gives them back; their mapping is the reader's to choose.

    The file is written under another name beside it and renamed at the end, so that it is never half there.
    """
    file = Path(file)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as out:
            for clip in clips:
                entry = {key: getattr(clip, key) for key in REQUIRED} | clip.extra
                out.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


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


def _conversion(file: Path, label_format: str) -> str:
    out = file.with_suffix(".labels.jsonl" if file.suffix == ".jsonl" else ".jsonl")
    command = f"python -m data.labels convert {shlex.quote(str(file))} --out {shlex.quote(str(out))}"
    looks = FORMATS[label_format].looks
    return f"not this project's JSONL but {looks}; convert it: {command} --dataset NAME --mos-range LO HI"


if __name__ == "__main__":
    from data.label_tool import main  # it imports data.labels anew: this copy of the module defines nothing for it

    raise SystemExit(main())
