"""The command `python -m data.labels`: convert the field's label files to this project's, and check label files."""

import argparse
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from data.benchmarks import BENCHMARKS
from data.label_formats import FORMATS, Row, open_labels, read_rows
from data.labels import Clip, missing_videos, write_labels
from data.splits import source_of, split_validation

Range = tuple[float, float]
BINS = 10
BAR = 40  # characters of the longest bar of a histogram


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> Parser:
    parser = Parser(prog="python -m data.labels", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="{convert,check}", required=True)
    known = ", ".join(BENCHMARKS)

    about = "write a label file in any known format as this project's JSONL"
    convert = commands.add_parser("convert", help=about, description=about, allow_abbrev=False)
    convert.add_argument("labels", metavar="IN", help="label file in any of the known formats")
    convert.add_argument("--out", required=True, help="file to write; it must not exist")
    convert.add_argument("--dataset", metavar="NAME", help="name of the data set; a project file has its own")
    convert.add_argument(
        "--mos-range",
        nargs=2,
        type=float,
        metavar=("LO", "HI"),
        help=f"scale of the scores; a project file has its own, and it is known for {known}",
    )
    convert.add_argument(
        "--split",
        metavar="NAME",
        help="split of all clips (default: a project file's own, test for released-test, train for the others)",
    )
    convert.add_argument("--videos", metavar="DIR", help="video folder: completes a csv's names, counts missing files")
    convert.add_argument(
        "--source-pattern",
        metavar="REGEX",
        help="its one group, searched in each path, is the clip's source (default: the benchmark's, if it has one)",
    )
    convert.add_argument("--val-fraction", type=float, metavar="X", help="move this share of split train to split val")
    convert.add_argument("--seed", type=int, help="seed of that choice, needed with --val-fraction")

    about = "report on a label file and its videos; exit status 1 if a line is faulty"
    check = commands.add_parser("check", help=about, description=about, allow_abbrev=False)
    check.add_argument("labels", metavar="LABELS", help="label file in any of the known formats")
    check.add_argument("--videos", required=True, metavar="DIR", help="folder that its paths start from")
    check.add_argument("--strict", action="store_true", help="exit 1 also if a video is missing or unreadable")

    for command in (convert, check):
        command.add_argument(
            "--label-format", choices=tuple(FORMATS), metavar="F", help=f"{', '.join(FORMATS)} (default: by content)"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Wrong flags and files leave with one line on stderr and status 2."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        return convert(args) if args.command == "convert" else check(args)
    except ValueError as error:
        parser.error(str(error))


def convert(args: argparse.Namespace) -> int:
    """Write IN as --out and say what was written. Writes nothing where it raises ValueError with the line or flag."""
    out = Path(args.out)
    if os.path.lexists(out):
        raise ValueError(f"--out {out} exists already")
    for name in ("dataset", "split"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} must not be empty")
    if (args.seed is None) != (args.val_fraction is None):
        raise ValueError("--val-fraction and --seed need each other")
    label_format, content = open_labels(args.labels, args.label_format)
    if args.dataset is None and label_format != "project":
        raise ValueError(f"--dataset is needed: a file of format {label_format} does not name its data set")

    mos_range, origin = stated_range(args, label_format)
    rows, faults = read_rows(label_format, content, mos_range, args.videos)
    if faults:
        count = f" ({len(faults)} faults in all)" if len(faults) > 1 else ""
        raise ValueError(f"{args.labels}:{faults[0].place}: {faults[0].reason}{count}")
    if not rows:
        raise ValueError(f"{args.labels} has no clip")

    default_split = "test" if label_format == "released-test" else "train"
    clips = [
        Clip(
            row.path,
            row.mos,
            mos_range or row.mos_range,
            args.dataset or row.dataset,
            args.split or row.split or default_split,
            row.extra,
        )
        for row in rows
    ]
    clips = with_sources(clips, args.source_pattern)
    if args.val_fraction is not None:
        clips = split_validation(clips, args.val_fraction, args.seed)
    missing = missing_videos(clips, args.videos) if args.videos is not None else []
    try:
        write_labels(clips, out)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error

    print(f"{out}: {len(clips)} clips from {len(set(map(source_of, clips)))} sources, read as {label_format}")
    print_counts(clips)
    print(f"scale of the MOS: {origin}")
    if args.videos is not None:
        print(f"missing files: {len(missing)} of {len(clips)}")
    return 0


def stated_range(args: argparse.Namespace, label_format: str) -> tuple[Range | None, str]:
    """The scale of the scores and where it is from; None for the scales that the lines of the file state themselves."""
    if args.mos_range is not None:
        low, high = args.mos_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"--mos-range {low:g} {high:g}: must be two finite numbers, the lower one first")
        return (low, high), f"{low:g} to {high:g}, as given"
    if label_format == "project":
        return None, "as in the file"
    if label_format == "released-train":
        raise ValueError("--mos-range is needed: the released training list is not on the scale of its data set")
    if args.dataset not in BENCHMARKS:
        raise ValueError(f"--mos-range is needed: {args.dataset} is not one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[args.dataset]
    low, high = benchmark.range_in(label_format)
    return (low, high), f"{low:g} to {high:g}, of {args.dataset} in data/benchmarks.json ({benchmark.known_from})"


def with_sources(clips: list[Clip], pattern: str | None) -> list[Clip]:
    """Clips with `extra["source"]`: from `pattern`, else from the benchmark's where the clip has none yet.

    Raises ValueError naming --source-pattern: not a regular expression with one group, or a path that it does not fit.
    """
    if pattern is not None:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"--source-pattern {pattern}: {error}") from error
        if groups != 1:
            raise ValueError(f"--source-pattern {pattern}: must have one group, it has {groups}")

    def with_source(clip: Clip) -> Clip:
        benchmark = BENCHMARKS.get(clip.dataset) if "source" not in clip.extra else None
        expression = pattern if pattern is not None else benchmark and benchmark.source
        if expression is None:
            return clip
        found = re.search(expression, clip.path)
        if not (found and found[1]):
            raise ValueError(f"--source-pattern {expression}: finds no source in {clip.path!r}")
        return replace(clip, extra={**clip.extra, "source": found[1]})

    return [with_source(clip) for clip in clips]


def check(args: argparse.Namespace) -> int:
    """Print the report; 1 if a line is faulty or, with --strict, a video is missing or unreadable, otherwise 0."""
    videos = Path(args.videos)
    if not videos.is_dir():
        raise ValueError(f"--videos {videos} is not a folder")
    label_format, content = open_labels(args.labels, args.label_format)
    rows, faults = read_rows(label_format, content, videos=videos)
    there = {row.path: os.path.exists(videos / row.path) for row in rows}
    missing = [path for path, exists in there.items() if not exists]
    unreadable = unreadable_videos(videos, [path for path, exists in there.items() if exists])

    print(f"format: {label_format} ({FORMATS[label_format].looks})")
    print(f"clips: {len(rows)}")
    print_counts(rows)
    print_list("faulty lines", [f"{args.labels}:{fault.place}: {fault.reason}" for fault in faults], 20)
    print(f"  of these, paths that come twice: {sum(fault.duplicate for fault in faults)}")
    print_list("missing files", missing, 10)
    reasons = "".join(f", {reason} {count}" for reason, count in Counter(r for r, _ in unreadable).most_common())
    print_list("unreadable files", [text for _, text in unreadable], 10, reasons)
    by_range = defaultdict(list)
    for row in rows:
        by_range[row.mos_range].append(row.mos)
    for stated, scores in by_range.items():
        print_histogram(scores, stated)
    return 1 if faults or (args.strict and (missing or unreadable)) else 0


def unreadable_videos(folder: Path, paths: list[str]) -> list[tuple[str, str]]:
    """(reason, description) of every file that can be told from its header to give no frames."""
    from data.video import MediaError, check_readable  # torch; the rest of this program does without

    found = []
    for path in paths:
        try:
            check_readable(folder / path)
        except MediaError as error:
            found.append((error.reason, str(error)))
    return found


def print_counts(clips: Iterable[Clip | Row]) -> None:
    for (dataset, split), count in Counter((clip.dataset, clip.split) for clip in clips).items():
        print(f"  {dataset or 'data set not stated'}, {split or 'split not stated'}: {count}")


def print_list(title: str, lines: list[str], most: int, detail: str = "") -> None:
    print(f"{title}: {len(lines)}{detail}")
    for line in lines[:most]:
        print(f"  {line}")
    if len(lines) > most:
        print(f"  ... and {len(lines) - most} more")


def histogram(scores: list[float], low: float, high: float) -> list[int]:
    """How many scores fall in each of BINS equal parts of low..high; a score on an edge belongs above it."""
    counts = [0] * BINS
    for score in scores:
        counts[min(BINS - 1, int(BINS * (score - low) / (high - low)))] += 1
    return counts


def print_histogram(scores: list[float], stated: Range | None) -> None:
    found = (min(scores), max(scores))
    low, high = stated or found
    print(f"MOS: {found[0]:g} to {found[1]:g} found, {f'{low:g} to {high:g}' if stated else 'no range'} stated")
    if low == high:
        return
    counts = histogram(scores, low, high)
    for index, count in enumerate(counts):
        edges = [low + (high - low) * k / BINS for k in (index, index + 1)]
        bar = "#" * math.ceil(BAR * count / max(counts))
        print(f"  {edges[0]:8.3f} to {edges[1]:8.3f} {count:7d} {bar}")
