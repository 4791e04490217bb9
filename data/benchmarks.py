"""The ten benchmarks of the paper, from benchmarks.json beside this file; its notes say what each entry rests on."""

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("benchmarks.json")


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    `mos_range`: the scale (low, high) of its MOS. `known_from`: what says so. `domain`: "in" or "ood", seen from a
    model trained on LSVQ. `videos`: how many its list holds, by label format. `published`: model -> {"srcc": ...,
    "plcc": ...}. `source`: a regular expression whose one group finds the source clip in a file name; None where every
    clip is a source of its own. `released_range`: the scale in the released test list, where that differs.
    """

    mos_range: tuple[float, float]
    known_from: str
    domain: str
    videos: dict[str, int]
    published: dict[str, dict[str, float]]
    source: str | None = None
    released_range: tuple[float, float] | None = None

    def range_in(self, label_format: str) -> tuple[float, float]:
        """The scale of this benchmark's scores in a label file of one format."""
        return self.released_range if self.released_range and label_format == "released-test" else self.mos_range


def read_benchmarks(file: Path = FILE) -> dict[str, Benchmark]:
    """The benchmarks by name, in the order of the file."""
    entries = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    ranges = ("mos_range", "released_range")
    return {
        name: Benchmark(**{key: tuple(map(float, value)) if key in ranges else value for key, value in entry.items()})
        for name, entry in entries.items()
    }


BENCHMARKS = read_benchmarks()
