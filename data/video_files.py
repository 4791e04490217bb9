"""Videos on the disk, found by name."""

import glob
from pathlib import Path

from data.label_formats import VIDEO_SUFFIXES


def video_files(place: str | Path) -> list[Path]:
    """The video files of a folder and the folders in it, or those that fit a glob pattern, sorted by path.

    They are the files whose name ends in one of VIDEO_SUFFIXES, large or small letters. `**` in a pattern stands for
    folders at any depth. Raises ValueError if there are none.
    """
    folder = Path(place)
    found = folder.rglob("*") if folder.is_dir() else map(Path, glob.iglob(str(place), recursive=True))
    files = sorted(path for path in found if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{place}: no video file there ({', '.join(VIDEO_SUFFIXES)})")
    return files
