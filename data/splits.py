"""A validation split taken from the training clips: by whole sources, spread over the MOS, the same for the same seed.

Versions of one source look alike, so a source with clips on both sides would flatter the validation score.
"""

import math
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import PurePath

from data.labels import Clip


def source_of(clip: Clip) -> tuple[str, str]:
    """(data set, source clip): `extra["source"]`, or the file's name without folder and extension, case folded.

    >>> source_of(Clip("batch1/Beach.mp4", mos=3.0, mos_range=(1.0, 5.0), dataset="LSVQ", split="train"))
    ('LSVQ', 'beach')
    """
    source = clip.extra.get("source")
    return clip.dataset, PurePath(clip.path).stem.casefold() if source is None else str(source)


def split_validation(clips: list[Clip], fraction: float, seed: int) -> list[Clip]:
    """The clips in their order, about `fraction` of those of split `train` moved to split `val`.

    Sources, sorted by their mean target and shuffled by `seed` within runs of about 1 / fraction, are walked in that
    order, and each goes to the side that keeps the share of validation clips nearest to `fraction`. So the number of
    validation clips is at most half the largest source away from it, and both sides span the MOS alike. The order of
    the clips does not matter.

    Raises ValueError naming --val-fraction: it is not inside (0, 1), a split `val` exists, or a side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--val-fraction {fraction}: must be above 0 and below 1")
    if any(clip.split == "val" for clip in clips):
        raise ValueError(f"--val-fraction {fraction}: the labels have a split 'val' already")

    targets = defaultdict(list)
    for clip in clips:
        if clip.split == "train":
            targets[source_of(clip)].append(clip.target)
    # fsum is exact before its one rounding, so the order of the clips cannot change a mean.
    ordered = sorted(targets, key=lambda source: (math.fsum(targets[source]) / len(targets[source]), source))
    run = round(1 / min(fraction, 1 - fraction))
    generator = random.Random(seed)

    validation, owed = set(), 0.0
    for start in range(0, len(ordered), run):
        sources = ordered[start : start + run]
        generator.shuffle(sources)
        for source in sources:
            size = len(targets[source])
            owed += fraction * size
            if owed > size / 2:
                validation.add(source)
                owed -= size
    if not 0 < len(validation) < len(targets):
        count = sum(map(len, targets.values()))
        raise ValueError(
            f"--val-fraction {fraction}: too few clips, {count} of split 'train' from {len(targets)} sources, "
            "to give both sides a source"
        )
    return [
        replace(clip, split="val") if clip.split == "train" and source_of(clip) in validation else clip
        for clip in clips
    ]
