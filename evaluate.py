"""Score videos with a trained policy: files, a folder, or labelled data sets with correlations.

    python evaluate.py --model runs/tiny-1/best --video clip.mp4 [--json]
    python evaluate.py --model runs/tiny-1/best --folder clips --csv scores.csv
    python evaluate.py --model runs/tiny-1/best --labels clips/demo/labels.jsonl --videos clips/demo --output runs/eval
    torchrun --standalone --nproc-per-node 8 evaluate.py --model runs/a/best --suite suite.json --output runs/eval

Scores run from 1 (bad) to 5 (excellent). An answer that cannot be read, or a file that cannot be decoded, gives no
score: it is listed with its reason, and `coverage` is the share of videos that have one. See docs/evaluation.md.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from data.task_flags import add_task_arguments, task_arguments
from grpo.config import TINY_MODEL, Parser, option

EXIT_STATUS = """exit status:
  0    done
  1    the one video of --video has no score; with --strict: some video has none
  2    a flag or a file is wrong; nothing was scored
  130  stopped by Ctrl-C, 143 by SIGTERM: rows so far are kept, and the same command goes on from there
       (not with --video, which has printed what was done)
"""
SCALE = "1 (bad) to 5 (excellent), higher is better"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="evaluate.py",
        description=__doc__.splitlines()[0],
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, several = parser.add_argument, {"action": "append", "metavar": "FILE"}
    add("--model", default=TINY_MODEL, help="checkpoint folder or hub name (default: the tiny model)")
    add("--video", help="a file to score; may come several times", **several)
    add(
        "--json",
        action="store_true",
        help="with --video: print a JSON object a line, one for each video; with --compare: one in all",
    )
    add("--folder", help="score the videos in this folder and the folders in it")
    add("--csv", help="with --folder: where the scores go")
    add("--labels", help="label file (docs/data.md); may come several times, each with its --videos", **several)
    add("--videos", action="append", metavar="DIR", help="folder that the label file's paths start from")
    add("--suite", help="JSON file that lists several data sets (docs/evaluation.md)")
    add("--split", help="split of the label files to score (default: test)")
    add("--output", help="folder for the data sets' predictions.csv, metrics.json and results.md")
    add("--report", metavar="FILE", help="HTML page about data sets that are scored, or compared (docs/report.md)")
    add("--compare", nargs="+", metavar="FOLDER", help="evaluations or runs to set side by side")
    add("--strict", action="store_true", help="exit with 1 if any video got no score")
    add(
        "--score",
        choices=("greedy", "expected"),
        default="greedy",
        help="greedy: the number of the most likely answer; "
        "expected: the mean over all numbers that the policy could have written behind its reasoning (default: greedy)",
    )
    add("--samples", type=int, metavar="K", help="draw K answers; the score is their mean")
    add("--seed", type=int, help="with --samples or --task compare: of what is drawn (default: 0)")
    add("--temperature", type=float, help="with --samples or --score expected (default: the recipe's, as trained)")
    add("--frames", type=int, help="frames per video (default: the checkpoint's recipe)")
    add("--image-side", type=int, help="side of a frame in pixels (default: the recipe's, or the model's)")
    add(
        "--motion-recipe",
        choices=("train", "test"),
        help="settings of SlowFast in the released code's training (6 "
        "frames) or test (12), and no dense clips (default: the model's)",
    )
    add("--batch", type=int, default=16, help="videos per forward pass (default: 16)")
    add("--workers", type=int, default=2, help="videos that each process decodes at a time (default: 2)")
    add("--video-timeout", type=float, default=60.0, help="seconds to decode one video (default: 60)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    add(
        "--precision",
        choices=("float32", "mixed", "bfloat16"),
        default="float32",
        help="as for train.py (default: float32)",
    )
    add_task_arguments(parser)
    args = task_arguments(parser, parser.parse_args(arguments))
    if args.task is None:
        check_scoring(parser, args)
    check_bounds(parser, args)
    args.split = args.split or "test"
    return args


def check_scoring(parser: Parser, args: argparse.Namespace) -> None:
    """End with status 2 and a line that names the flag, for flags that do not go together where scores are wanted."""
    modes = {"--video": args.video, "--folder": args.folder, "--labels": args.labels, "--suite": args.suite}
    modes["--compare"] = args.compare
    given = [flag for flag, value in modes.items() if value]
    if not given:
        parser.error(
            "give --video FILE, --folder DIR --csv FILE, --labels FILE --videos DIR --output DIR, "
            "--suite FILE --output DIR, --task TASK, or --compare FOLDER FOLDER ..."
        )
    if len(given) > 1:
        parser.error(f"{given[0]} goes without {given[1]}")
    (mode,) = given
    if args.compare:
        ignored = vars(args).keys() - {"compare", "json", "report"}
        for name in sorted(name for name in ignored if getattr(args, name) != parser.get_default(name)):
            parser.error(f"{option(name)}: goes without --compare, which scores nothing")
    wanted_by = {  # flag: its value, and the modes that need it
        "--csv": (args.csv, ("--folder",)),
        "--videos": (args.videos, ("--labels",)),
        "--output": (args.output, ("--labels", "--suite")),
    }
    if args.report and mode not in ("--labels", "--suite", "--compare"):
        parser.error(f"--report goes with --labels, --suite and --compare, not with {mode}")
    if args.split and mode not in ("--labels", "--suite"):
        parser.error(f"--split {args.split}: goes with --labels and --suite, not with {mode}")
    for flag, (value, wanting) in wanted_by.items():
        if value and mode not in wanting:
            parser.error(f"{flag} goes with {' and '.join(wanting)}, not with {mode}")
        if mode in wanting and not value:
            parser.error(f"{mode} needs {flag}")
    if args.labels and len(args.labels) != len(args.videos):
        parser.error(
            f"--labels came {len(args.labels)} times and --videos {len(args.videos)} times: give them in pairs"
        )
    if args.json and not (args.video or args.compare):
        parser.error("--json goes with --video and --compare")
    if args.score == "expected" and args.samples is not None:
        parser.error(f"--samples {args.samples}: goes without --score expected")
    if args.seed is not None and args.samples is None:
        parser.error(f"--seed {args.seed}: goes with --samples or --task compare")
    if args.temperature is not None and args.samples is None and args.score == "greedy":
        parser.error(f"--temperature {args.temperature}: goes with --samples or --score expected")


def check_bounds(parser: Parser, args: argparse.Namespace) -> None:
    for name in ("frames", "image_side", "batch", "workers", "samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("video_timeout", "temperature"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be a number above 0")


if __name__ == "__main__":
    ARGUMENTS = parse_arguments(sys.argv[1:])  # answers --help and refuses wrong flags before torch is loaded

import hashlib
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import av
import torch
import transformers
from tqdm import tqdm

from data import journal
from data.benchmarks import BENCHMARKS
from data.recipe import Recipe
from data.suite import Dataset, Source, read_datasets, read_suite
from data.tables import read_csv, replacing, write_csv
from data.video import MediaError, read_frames
from data.video_files import video_files
from grpo import checkpoint, compare, distributed
from grpo.report import write_report
from grpo.signals import SIGNALS, Stopped
from models.loading import check_checkpoint
from models.scorer import Score, Scorer, load_scorer
from models.understanding import run_task
from rewards.logistic import fit_logistic
from rewards.metrics import correlations, intervals, paired_bootstrap
from rewards.results_table import DOMAINS, as_markdown, as_text, results_table

COLUMNS = ("path", "score", "spread", "status", "reason", "flags", "reasoning", "answers", "mass")
SCORES = (*COLUMNS, "scale")  # of CSV files
LABELLED = ("path", "mos", "target", *SCORES[1:])
DAY_S = 86400.0  # one process may have the slow videos; torchrun ends the others if it is lost


# ---- scoring, the work split over all processes


def score_over_ranks(scorer: Scorer, paths: list[str], root: str | Path) -> list[Score]:
    """Every process gets the scores of all videos, in order; nothing is written."""
    share = range(len(paths))[distributed.rank() :: distributed.world_size()]
    scores = scorer.scores((paths[index] for index in share), root)
    rows = [{"index": index, "score": score.row()} for index, score in zip(share, scores)]
    found = {row["index"]: row["score"] for row in distributed.gather_rows(rows, scorer.policy.device)}
    return [Score.from_row(found[index]) for index in range(len(paths))]


def score_and_keep(scorer: Scorer, paths: list[str], root: Path, folder: Path, settings: dict) -> list[Score]:
    """The scores of all videos, in order, in the main process; none in the others.

    Each is a line in `folder` as soon as it is there. What was there before is not made again, unless the file gave no
    frames then: it is tried again.
    """
    done = {path: score for path, score in kept(folder).items() if score.status != "unreadable"}
    if distributed.is_main():
        journal.begin(folder, settings)
    distributed.barrier()  # the folder is there, and all have read what is done, before any writes
    mine = [path for path in paths if path not in done][distributed.rank() :: distributed.world_size()]
    with journal.appending(folder, distributed.rank()) as write:
        for score in progress(scorer.scores(mine, root), len(mine), folder.name):
            write(score.row())
    distributed.barrier()
    if not distributed.is_main():
        return []
    every = kept(folder)
    return [every[path] for path in paths]


def kept(folder: Path) -> dict[str, Score]:
    """The scores in `folder` by path: those of a finished evaluation and those that processes left, in any order.

    A file that gave no frames and later did is there with what it gave.
    """
    finished = folder / "predictions.csv"
    rows = [from_csv(row) for row in read_csv(finished)] if finished.exists() else []
    rows = sorted(rows + journal.read_rows(folder), key=lambda row: row["status"] != "unreadable")
    return {row["path"]: Score.from_row(row) for row in rows}


def progress(scores: Iterable[Score], total: int, name: str) -> Iterator[Score]:
    shown = distributed.is_main() and sys.stderr.isatty()
    return iter(tqdm(scores, name, total, unit="video", disable=not shown))


def to_csv(score: Score) -> dict:
    """The cells of SCORES; `answers` as a JSON list, null for one that cannot be read."""
    row = {**score.row(), "answers": json.dumps(score.answers) if score.answers else None, "scale": SCALE}
    return {name: row[name] for name in SCORES}


def from_csv(row: dict[str, str]) -> dict:
    numbers = {name: float(row[name]) if row[name] else None for name in ("score", "spread", "mass")}
    return {name: row[name] for name in COLUMNS} | numbers | {"answers": json.loads(row["answers"] or "[]")}


# ---- what is asked for, checked before a model is loaded


def asked(args: argparse.Namespace) -> Recipe:
    clips = 0 if args.motion_recipe else None
    given = {"frames": args.frames, "image_side": args.image_side, "temperature": args.temperature}
    return Recipe.of(args.model).but(motion_clips=clips, **given)


def datasets_of(args: argparse.Namespace, recipe: Recipe) -> list[Dataset]:
    """The labelled data sets, read; none with --video or --folder. Missing videos are told."""
    if args.suite:
        sources = read_suite(args.suite, args.split)
    else:
        pairs = zip(args.labels or (), args.videos or ())
        sources = [Source(None, Path(labels), Path(videos), args.split) for labels, videos in pairs]
    datasets = read_datasets(sources, recipe.mos_mapping)
    for dataset in datasets:
        if dataset.missing:
            count = f"{len(dataset.missing)} of {len(dataset.clips)} videos are missing"
            warn(f"{dataset.name}: {count}, {dataset.missing[0].path} first")
    return datasets


def check_model(model: str) -> None:
    """Raise ValueError naming --model for a checkpoint that is not as its manifest says, if it has one."""
    if (Path(model) / checkpoint.MANIFEST).is_file() and (wrong := checkpoint.damage(Path(model))):
        raise ValueError(f"--model {model}: damaged: {wrong}")


def identity(model: str) -> str:
    """What tells a checkpoint from another: its name, and a digest of its manifest or of its files' sizes and times."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    manifest = folder / checkpoint.MANIFEST
    stat = {file.name: file.stat() for file in sorted(folder.iterdir())}
    facts = repr([(name, found.st_size, found.st_mtime_ns) for name, found in stat.items()])
    known = manifest.read_text() if manifest.is_file() else facts
    return f"{folder.resolve()} ({hashlib.sha256(known.encode()).hexdigest()[:12]})"


def scoring(args: argparse.Namespace) -> dict:
    how = {"score": "mean of samples", "samples": args.samples, "seed": args.seed or 0, "top_p": 1.0}
    return how if args.samples else {"score": args.score}


def settings_of(args: argparse.Namespace, recipe: Recipe, videos: Path, dataset: Dataset | None = None) -> dict:
    """All that scores depend on; --batch, --device and the number of processes can change no more than rounding."""
    settings = {"model": identity(args.model), "precision": args.precision, "motion_recipe": args.motion_recipe}
    settings |= {"videos": str(videos.resolve()), **scoring(args)}
    settings |= {f"recipe.{name}": value for name, value in asdict(recipe).items()}
    if dataset:
        settings |= {"labels": checkpoint.sha256(dataset.labels), "split": dataset.split}
    return settings


def load(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> Scorer:
    names = ("precision", "motion_recipe", "score", "batch", "workers", "video_timeout")
    how = {name: getattr(args, name) for name in names}
    return load_scorer(args.model, device, recipe=recipe, samples=args.samples or 0, seed=args.seed or 0, **how)


# ---- the three things that can be scored; each returns the exit status


def score_videos(args: argparse.Namespace, scorer: Scorer) -> int:
    """Print each score when it is there."""
    failed = 0
    for score in progress(scorer.scores(args.video), len(args.video), "videos"):
        failed += score.value is None
        tqdm.write(json.dumps(score.row()) if args.json else in_words(score, len(args.video) > 1))
    return int(failed > 0 and (args.strict or len(args.video) == 1))


def score_folder(args: argparse.Namespace, recipe: Recipe, scorer: Scorer, paths: list[str]) -> int:
    root, folder = Path(args.folder), partial_folder(args.csv)
    scores = score_and_keep(scorer, paths, root, folder, settings_of(args, recipe, root))
    if not distributed.is_main():
        return 0
    write_csv(Path(args.csv), SCORES, map(to_csv, scores))
    journal.remove(folder)
    scored = sum(score.value is not None for score in scores)
    print(f"{args.csv}: {scored} of {len(scores)} videos have a score, {SCALE}")
    return int(args.strict and scored < len(scores))


def score_datasets(args: argparse.Namespace, recipe: Recipe, scorer: Scorer, datasets: list[Dataset]) -> int:
    output, results = Path(args.output), {}
    for dataset in datasets:
        begun, folder = time.perf_counter(), output / dataset.name
        paths, settings = [clip.path for clip in dataset.clips], settings_of(args, recipe, dataset.videos, dataset)
        scores = score_and_keep(scorer, paths, dataset.videos, folder, settings)
        if distributed.is_main():
            rows = ({"mos": c.mos, "target": c.target, **to_csv(s)} for c, s in zip(dataset.clips, scores))
            write_csv(folder / "predictions.csv", LABELLED, rows)
            journal.remove_partial(folder)
            results[dataset.name] = measured(dataset, scores) | {"seconds": time.perf_counter() - begun}
    if not distributed.is_main():
        return 0
    metrics = {"model": args.model, "recipe": asdict(recipe), "mos_range": [1, 5], "higher_is_better": True}
    metrics |= {"scoring": {**scoring(args), "precision": args.precision, "motion_recipe": args.motion_recipe}}
    metrics |= {"command": shlex.join([Path(sys.executable).name, *sys.argv])}
    metrics |= {"versions": {module.__name__: module.__version__ for module in (torch, transformers, av)}}
    rows = results_table(results, {name: asdict(benchmark) for name, benchmark in BENCHMARKS.items()})
    means = {row["domain"]: row for row in rows if row["dataset"] in DOMAINS.values()}
    metrics |= {"datasets": results, "means": means}
    with replacing(output / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    with replacing(output / "results.md") as file:
        file.write(f"Scores of {args.model}: {SCALE}.\n\n{as_markdown(rows)}\n")
    print(f"{as_text(rows)}\nscores: {SCALE}; {output / 'metrics.json'}")
    if args.report:
        size = write_report(output, Path(args.report), frames_of(datasets, recipe, args.video_timeout), fit_logistic)
        print(f"{args.report}: {size / 2**20:.1f} MiB")
    return int(args.strict and any(result["scored"] < result["listed"] for result in results.values()))


def compare_folders(args: argparse.Namespace) -> int:
    try:
        found = compare.compare(args.compare, paired_bootstrap, Path(args.report) if args.report else None)
    except ValueError as error:
        warn(f"evaluate.py: error: {error}")
        return 2
    print(json.dumps(found, indent=2, allow_nan=False) if args.json else compare.text(found))
    return 0


# ---- results


def frames_of(
    datasets: list[Dataset], recipe: Recipe, video_timeout: float
) -> Callable[[str, str], torch.Tensor | None]:
    """For a report: the frames uint8 (F, 3, H, W) that the vision tower saw of a video, or None if it has none."""
    sampler, roots = recipe.but(motion_clips=0).make_sampler(), {d.name: d.videos for d in datasets}

    def frames(dataset: str, path: str) -> torch.Tensor | None:
        try:
            return read_frames(path, sampler, root=roots[dataset], timeout_s=video_timeout).pixels
        except MediaError:
            return None

    return frames


def measured(dataset: Dataset, scores: list[Score]) -> dict:
    """The figures of one data set, and how many videos have no score, by status and reason."""
    values, targets = [score.value for score in scores], [clip.target for clip in dataset.clips]
    failures = Counter(f"{score.status}: {score.reason}" for score in scores if score.value is None)
    return correlations(values, targets) | {"intervals": intervals(values, targets), "failures": dict(failures)}


def in_words(score: Score, named: bool) -> str:
    """One video's score for people."""
    name = f"{score.path}: " if named else ""
    if score.value is None:
        why = ": ".join(dict.fromkeys((score.status, score.reason)))
        return f"{name or score.path + ': '}no score ({why})"
    parsed = sum(answer is not None for answer in score.answers)
    spread = f" +- {score.spread:.2f}" if score.spread is not None else ""
    of = f", the mean of {parsed} of {len(score.answers)} answers" if score.answers else ""
    of += f", {score.mass:.1%} of the probability on such numbers" if score.mass is not None else ""
    return f"{score.reasoning}\n{name}score: {score.value:.2f}{spread}{of}, on {SCALE}"


def warn(message: str) -> None:
    if distributed.is_main():
        print(message, file=sys.stderr)


def partial_folder(file: str) -> Path:
    return Path(f"{file}.partial")


def make_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: no folder {folder} can be made: {error.strerror}") from error


def main(args: argparse.Namespace) -> int:
    if args.compare:
        return compare_folders(args)
    try:
        check_checkpoint(args.model)
        if args.task:
            check_model(args.model)
            return run_task(args)
        recipe = asked(args)
        datasets = datasets_of(args, recipe)
        for dataset in datasets:
            make_folder("--output", Path(args.output))
            journal.check(Path(args.output) / dataset.name, settings_of(args, recipe, dataset.videos, dataset))
        if args.folder:
            paths = [file.relative_to(args.folder).as_posix() for file in video_files(args.folder)]
            make_folder("--csv", Path(args.csv).parent)
            journal.check(partial_folder(args.csv), settings_of(args, recipe, Path(args.folder)))
        if args.video and distributed.world_size() > 1:
            raise ValueError("--video: goes with one process; several share the work of --folder, --labels and --suite")
        device = distributed.setup(args.device, DAY_S)
        distributed.from_main(lambda: check_model(args.model), device)
        scorer = load(args, recipe, device)
    except (ValueError, OSError) as error:
        warn(f"evaluate.py: error: {error}")
        return 2
    try:
        if args.video:
            return score_videos(args, scorer)
        if args.folder:
            return score_folder(args, scorer.recipe, scorer, paths)
        return score_datasets(args, scorer.recipe, scorer, datasets)
    finally:
        distributed.close()


def stop(number: int, _frame) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a reasoning or a file name
    for each in SIGNALS:
        signal.signal(each, stop)
    try:
        STATUS = main(ARGUMENTS)
    except Stopped as stopped:
        further = "" if ARGUMENTS.video else "; the same command goes on from here"
        warn(f"evaluate.py: {stopped}{further}")
        STATUS = stopped.exit_status
    sys.exit(STATUS)
