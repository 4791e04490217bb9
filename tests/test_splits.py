"""The validation split: whole sources, the asked share, the spread of the MOS, the same set of clips the same split."""

import random
from collections import Counter
from dataclasses import replace
from statistics import mean

import pytest

from data.labels import Clip
from data.splits import source_of, split_validation


def clip(path, mos=3.0, dataset="D", split="train", **extra):
    return Clip(path, mos, (1.0, 5.0), dataset, split, extra)


def set_of_clips(seed, sources=60, largest=6):
    """Sources of 1 to `largest` clips; the clips of a source have about the same MOS."""
    generator = random.Random(seed)
    clips = []
    for source in range(sources):
        level = generator.uniform(1.5, 4.5)
        for version in range(generator.randint(1, largest)):
            mos = level + generator.uniform(-0.5, 0.5)
            clips.append(clip(f"{source}_{version}.mp4", mos, source=f"s{source}"))
    return clips


def validation(clips):
    return [clip for clip in clips if clip.split == "val"]


def test_source_is_the_one_given_or_the_name_without_folder_and_extension():
    assert source_of(clip("a/Beach.MP4")) == source_of(clip("b/beach.mkv")) == ("D", "beach")
    assert source_of(clip("beach.mp4", dataset="E")) != source_of(clip("beach.mp4"))
    assert source_of(clip("x.mp4", source="S1")) == source_of(clip("y.mp4", source="S1")) == ("D", "S1")
    assert source_of(clip("x.mp4", source=None)) == ("D", "x")
    assert source_of(clip("x.mp4", source=1)) == ("D", "1")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.7, 0.9])
def test_whole_sources_move_and_nothing_else_changes(seed, fraction):
    clips = set_of_clips(seed)
    clips += [clip(f"t{i}.mp4", split="test", source=f"s{i}") for i in range(40)]
    after = split_validation(clips, fraction, seed)
    assert [replace(c, split="") for c in after] == [replace(c, split="") for c in clips]
    assert all(new.split in (old.split, "val") for old, new in zip(clips, after))
    assert all(new.split == "test" for old, new in zip(clips, after) if old.split == "test")
    sides = {side: {source_of(c) for c in after if c.split == side} for side in ("train", "val")}
    assert sides["train"] and sides["val"] and not sides["train"] & sides["val"]
    largest = max(Counter(map(source_of, set_of_clips(seed))).values())
    asked = fraction * sum(c.split == "train" for c in clips)
    assert abs(len(validation(after)) - asked) <= largest / 2 + 1e-9


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 10), (0.25, 25), (0.333, 33), (0.5, 50), (0.9, 90)])
def test_the_share_is_exact_where_every_clip_is_a_source(fraction, count):
    clips = [clip(f"{i}.mp4", 1 + 4 * i / 99) for i in range(100)]
    assert len(validation(split_validation(clips, fraction, 0))) == count


def test_the_order_of_the_clips_does_not_matter_and_the_seed_does():
    clips = set_of_clips(0)
    paths = {c.path for c in validation(split_validation(clips, 0.2, 7))}
    for shuffle in range(10):
        random.Random(shuffle).shuffle(clips)
        assert {c.path for c in validation(split_validation(clips, 0.2, 7))} == paths
    others = [frozenset(c.path for c in validation(split_validation(clips, 0.2, seed))) for seed in range(10)]
    assert len(set(others)) == 10


def test_every_source_can_be_drawn():
    clips = [clip(f"{i}.mp4", 1 + i / 10) for i in range(40)]
    drawn = Counter(c.path for seed in range(400) for c in validation(split_validation(clips, 0.1, seed)))
    assert len(drawn) == 40 and min(drawn.values()) > 15  # 40 expected of each, with standard deviation 6


@pytest.mark.parametrize("seed", range(10))
def test_both_sides_span_the_mos_alike(seed):
    generator = random.Random(seed)
    clips = [clip(f"{i}.mp4", generator.uniform(1, 5)) for i in range(200)]
    ordered = sorted(c.mos for c in clips)
    chosen = sorted(c.mos for c in validation(split_validation(clips, 0.1, seed)))
    assert len(chosen) == 20
    # One of every ten neighbours: the k-th chosen score lies among the k-th ten.
    assert all(ordered[10 * k] <= score <= ordered[10 * k + 9] for k, score in enumerate(chosen))
    assert abs(mean(chosen) - mean(ordered)) < 0.15  # 20 drawn at random: standard deviation 0.26


def test_strata_are_of_the_target_not_of_the_mos():
    """Two data sets, one 1..5 and one 0..100: the same targets, so each stratum has both."""
    clips = [clip(f"{i}.mp4", 1 + 4 * i / 49) for i in range(50)]
    clips += [Clip(f"{i}.mp4", 100 * i / 49, (0.0, 100.0), "E", "train") for i in range(50)]
    chosen = sorted(c.target for c in validation(split_validation(clips, 0.1, 0)))
    expected = [1 + 4 * (5 * k + 2) / 49 for k in range(10)]
    assert all(abs(target - middle) <= 4 * 2 / 49 + 1e-9 for target, middle in zip(chosen, expected))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_the_fraction_is_inside_0_and_1(fraction):
    with pytest.raises(ValueError, match=r"--val-fraction .*: must be above 0 and below 1"):
        split_validation(set_of_clips(0), fraction, 0)


@pytest.mark.parametrize(
    ("clips", "fraction", "says"),
    [
        ([clip("a.mp4"), clip("b.mp4", split="val")], 0.5, "a split 'val' already"),
        ([], 0.5, "0 of split 'train' from 0 sources"),
        ([clip("a.mp4", split="test"), clip("b.mp4", split="test")], 0.5, "0 of split 'train'"),
        ([clip("x/a.mp4"), clip("y/a.mp4")], 0.5, "2 of split 'train' from 1 sources"),
        ([clip(f"{i}.mp4") for i in range(4)], 0.1, "4 of split 'train' from 4 sources"),
        ([clip(f"{i}.mp4") for i in range(4)], 0.9, "4 of split 'train' from 4 sources"),
    ],
)
def test_no_split_is_refused_with_the_reason(clips, fraction, says):
    with pytest.raises(ValueError, match=f"--val-fraction {fraction}: .*{says}"):
        split_validation(clips, fraction, 0)
