"""Which label files an evaluation is about: pairs of files and folders, or a suite that lists them in one JSON file.

    {"datasets": [{"name": "KoNViD-1k", "labels": "konvid.jsonl", "videos": "KoNViD_1k_videos", "split": "test"}, ...]}

Paths in a suite start from its own folder. `split` may be left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data.labels import Clip, read_labels

REQUIRED, OPTIONAL = ("name", "labels", "videos"), ("split",)


@dataclass(frozen=True)
class Source:
    """A label file and its videos' folder, not read yet; `name` None for one that its labels name."""

    name: str | None
    labels: Path
    videos: Path
    split: str


@dataclass(frozen=True)
class Dataset:
    """A label file, read: the clips of a split, and those of them that have no file under `videos`."""

    name: str
    labels: Path
    videos: Path
    split: str
    clips: list[Clip]
    missing: list[Clip]


def read_suite(file: str | Path, split: str) -> list[Source]:
    """The data sets of a suite; `split` for those that name none.

    Raises ValueError naming --suite: a file that cannot be read or is no suite, a key that is not known or absent, a
    value that is no text.
    """
    try:
        suite = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--suite {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--suite {file}: not JSON: {error}") from error
    _check_keys(f"--suite {file}", suite, ("datasets",))
    if not (isinstance(suite["datasets"], list) and suite["datasets"]):
        raise ValueError(f"--suite {file}: datasets must be a list with an entry or more")
    sources = []
    for k, entry in enumerate(suite["datasets"]):
        place = f"--suite {file}: datasets[{k}]"
        _check_keys(place, entry, REQUIRED, OPTIONAL)
        for key, value in entry.items():
            if not (isinstance(value, str) and value):
                raise ValueError(f"{place}: {key} must be a text, got {value!r}")
        labels, videos = (Path(file).parent / entry[key] for key in ("labels", "videos"))
        sources.append(Source(entry["name"], labels, videos, entry.get("split", split)))
    return sources


def read_datasets(sources: list[Source], mapping: str) -> list[Dataset]:
    """All label files, read and checked. A name that is not given is the labels' own if they agree, else the file's.

    mapping: as for `read_labels`. Missing videos are counted, even if all are: they get no score.

    Raises ValueError: those of `read_labels`; for a folder that is none, a name that comes twice or
    can be no folder's.
    """
    datasets: list[Dataset] = []
    for source in sources:
        clips = read_labels(source.labels, source.split, mapping)
        if not source.videos.is_dir():
            raise ValueError(f"--videos {source.videos} is not a folder")
        stated = {clip.dataset for clip in clips}
        name = source.name or (stated.pop() if len(stated) == 1 else source.labels.stem)
        if Path(name).name != name or name == ".." or "\0" in name:
            raise ValueError(f"{source.labels}: the name {name!r} can be no folder's; give another in a --suite")
        if name in (dataset.name for dataset in datasets):
            raise ValueError(f"{source.labels}: the name {name!r} comes twice; give others in a --suite")
        missing = [clip for clip in clips if not (source.videos / clip.path).exists()]
        datasets.append(Dataset(name, source.labels, source.videos, source.split, clips, missing))
    return datasets


def _check_keys(place: str, entry: object, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected a JSON object")
    for key in entry:
        if key not in required + optional:
            raise ValueError(f"{place}: unknown key {key!r}; known are {', '.join(required + optional)}")
    for key in required:
        if key not in entry:
            raise ValueError(f"{place}: no {key}")
