"""Score videos with a trained policy: a labelled list, with correlations, or one file.

    python evaluate.py --model runs/tiny/best --labels clips/demo/labels.jsonl --videos clips/demo --output runs/eval
    python evaluate.py --model runs/tiny/best --video clip.mp4 [--json]

Scores run from 1 (bad) to 5 (excellent). Decoding is greedy: the same command gives the same scores. An answer
that cannot be read, or a file that cannot be decoded, gives no score: it is listed with its reason, and `coverage` is
the share of videos that have one.
"""

import csv
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.task_flags import add_task_arguments, task_arguments
from grpo.config import TINY_MODEL, Parser

COLUMNS = ("path", "mos", "score", "status", "reason", "flags", "reasoning")


def parse_arguments(arguments: list[str]):
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default=TINY_MODEL, help="checkpoint folder or hub name (default: the tiny model)")
    parser.add_argument("--video", help="one file to score")
    parser.add_argument("--json", action="store_true", help="with --video: print one JSON object")
    parser.add_argument("--labels", help="label file (docs/data.md)")
    parser.add_argument("--videos", help="folder that the label file's paths start from")
    parser.add_argument("--split", default="test", help="split of the label file to score (default: test)")
    parser.add_argument("--output", help="folder for predictions.csv and metrics.json")
    parser.add_argument("--frames", type=int, help="frames per video (default: the checkpoint's recipe)")
    parser.add_argument(
        "--image-side", type=int, help="side of a frame in pixels (default: the recipe's, or the model's)"
    )
    parser.add_argument(
        "--motion-recipe",
        choices=("train", "test"),
        help="settings of SlowFast in the released code's training (6 frames) or test (12), and no dense clips "
        "(default: the model's)",
    )
    parser.add_argument("--batch", type=int, default=16, help="videos per forward pass (default: 16)")
    parser.add_argument("--video-timeout", type=float, default=60.0, help="seconds to decode one video (default: 60)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument(
        "--precision",
        choices=("float32", "mixed", "bfloat16"),
        default="float32",
        help="as for train.py (default: float32)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any video got no score")
    add_task_arguments(parser)
    args = task_arguments(parser, parser.parse_args(arguments))
    if args.task is None and args.video is None and not (args.labels and args.videos and args.output):
        parser.error("give --video FILE, or --labels FILE --videos DIR --output DIR")
    if args.video is not None and (args.labels or args.videos or args.output):
        parser.error("--video scores one file: it goes without --labels, --videos and --output")
    if args.json and args.video is None:
        parser.error("--json goes with --video")
    for name in ("frames", "image_side", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < args.video_timeout < math.inf:
        parser.error(f"--video-timeout {args.video_timeout}: must be a number above 0")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments(sys.argv[1:])  # answers --help and refuses wrong flags before torch is loaded

import torch
from scipy import stats

from data.labels import missing_videos, read_labels
from data.recipe import Recipe
from data.samplers import frames_and_clips
from data.video import MediaError, read_frames, resize_square
from grpo import distributed
from models.loading import check_checkpoint, load_policy
from models.policy import Policy, Videos
from models.slowfast import RECIPES
from models.understanding import run_task
from rewards.parse import parse_answer


@dataclass(frozen=True)
class Prediction:
    """What became of one video: `score` in 1..5, or None with `status` ('unparsed', 'unreadable') and `reason`.

    flags: what is unusual about the file, such as `truncated`, separated by spaces; see `data.video.Frames`.
    """

    path: str
    score: float | None
    status: str
    reason: str
    flags: str
    reasoning: str


def score_videos(
    policy: Policy, paths: list[str], root: Path, recipe: Recipe, video_timeout: float, batch: int = 16
) -> list[Prediction]:
    """Greedy answers to the videos root/path, in order; each may take `video_timeout` seconds to decode."""
    sampler = recipe.make_sampler(policy.clip_frames)
    prompt_ids = policy.prompt_ids(recipe.words.system, recipe.words.user_text, recipe.frames)
    predictions: dict[str, Prediction] = {}
    for start in range(0, len(paths), batch):
        pixels, flags = {}, {}
        for path in paths[start : start + batch]:
            try:
                frames = read_frames(path, sampler, root=root, timeout_s=video_timeout)
                pixels[path] = resize_square(frames.pixels, policy.image_side)
                flags[path] = " ".join(sorted(frames.flags))
            except MediaError as error:
                predictions[path] = Prediction(path, None, "unreadable", error.reason, "", "")
        if not pixels:
            continue
        frames, clips = zip(*(frames_and_clips(chosen, sampler) for chosen in pixels.values()))
        clips = torch.stack(clips) if recipe.motion_clips else None
        videos = Videos(torch.stack(frames), prompt_ids.expand(len(frames), -1), motion_clips=clips)
        texts = policy.texts(policy.greedy(policy.encode(videos), recipe.max_new_tokens))
        for path, (text,) in zip(pixels, texts):
            answer = parse_answer(text)
            status = "unparsed" if answer.score is None else "ok"
            reason = answer.reason or ""
            predictions[path] = Prediction(path, answer.score, status, reason, flags[path], answer.reasoning)
    return [predictions[path] for path in paths]


def correlations(scores: list[float | None], mos: list[float]) -> dict:
    """SRCC, PLCC (raw, no fit), KRCC and RMSE over the videos that have a score; MOS on the same 1..5 scale.

    A number that is not defined is None, and `undefined` says why. `coverage` is the share of videos with a score.

    >>> correlations([1.0, 2.0, None, 4.0], [1.0, 3.0, 5.0, 4.0])["coverage"]
    0.75
    """
    pairs = [(score, target) for score, target in zip(scores, mos, strict=True) if score is not None]
    result = dict.fromkeys(("srcc", "plcc", "krcc", "rmse", "undefined"))
    result |= {"scored": len(pairs), "listed": len(mos), "coverage": len(pairs) / len(mos) if mos else None}
    if pairs:
        result["rmse"] = (sum((score - target) ** 2 for score, target in pairs) / len(pairs)) ** 0.5
    if len(pairs) < 3:
        result["undefined"] = "fewer than 3 scored videos"
    elif any(min(column) == max(column) for column in zip(*pairs)):
        result["undefined"] = "all scores, or all MOS, are equal"
    else:
        x, y = zip(*pairs)
        result["srcc"] = float(stats.spearmanr(x, y).statistic)
        result["plcc"] = float(stats.pearsonr(x, y).statistic)
        result["krcc"] = float(stats.kendalltau(x, y).statistic)
    return result


def score_over_ranks(
    policy: Policy, paths: list[str], root: Path, recipe: Recipe, video_timeout: float
) -> list[float | None]:
    """The scores alone, the work split over all processes; every process gets all of them, in order."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = [p.score for p in score_videos(policy, paths[rank::world_size], root, recipe, video_timeout)]
    padded = torch.full((-(-len(paths) // world_size),), torch.nan, dtype=torch.float64, device=policy.device)
    padded[: len(mine)] = torch.tensor([torch.nan if score is None else score for score in mine])
    every = distributed.gather(padded).view(world_size, -1).T.flatten()[: len(paths)]  # rank r holds r, r + W, ...
    return [None if score != score else score for score in every.tolist()]


def main(args) -> int:
    if args.task is not None:
        return run_task(args)
    try:
        check_checkpoint(args.model)
        recipe = Recipe.of(args.model)
        if args.video is None:
            clips = read_labels(args.labels, args.split, recipe.mos_mapping)
            missing = missing_videos(clips, args.videos)
            if missing:
                print(f"{len(missing)} of {len(clips)} videos are missing, {missing[0].path} first", file=sys.stderr)
        clips_off = 0 if args.motion_recipe else None
        given = {"frames": args.frames, "image_side": args.image_side, "motion_clips": clips_off}
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
        device = distributed.setup(args.device)
        network = {"image_side": recipe.image_side, "motion_clips": recipe.motion_clips > 0}
        network |= {"motion_settings": RECIPES.get(args.motion_recipe), "precision": args.precision}
        policy = load_policy(args.model, device=device, **network).eval()
        policy.check_frames(recipe.frames, recipe.motion_clips)
        policy.check_length(recipe.words, recipe.frames, recipe.max_new_tokens)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2

    if args.video is not None:
        path = Path(args.video)
        (prediction,) = score_videos(policy, [path.name], path.parent, recipe, args.video_timeout)
        if args.json:
            print(json.dumps({**asdict(prediction), "path": args.video, "scale": "1 (bad) to 5 (excellent)"}))
        elif prediction.score is None:
            print(f"{args.video}: no score ({prediction.status}: {prediction.reason})")
        else:
            print(f"{prediction.reasoning}\nscore: {prediction.score:.2f} on 1 (bad) to 5 (excellent)")
        return int(prediction.score is None)

    paths = [clip.path for clip in clips]
    predictions = score_videos(policy, paths, Path(args.videos), recipe, args.video_timeout, args.batch)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for clip, prediction in zip(clips, predictions):
            writer.writerow({"mos": f"{clip.target:.4f}", **asdict(prediction)})
    metrics = correlations([p.score for p in predictions], [clip.target for clip in clips])
    failures = Counter(f"{p.status}: {p.reason}" for p in predictions if p.score is None)
    metrics |= {"failures": dict(failures), "scale": [1, 5], "model": args.model, "recipe": asdict(recipe)}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shown = {name: metrics[name] for name in ("srcc", "plcc", "krcc", "rmse")}
    print("  ".join(f"{name.upper()} {'-' if value is None else f'{value:.3f}'}" for name, value in shown.items()))
    print(f"scored {metrics['scored']} of {metrics['listed']} videos; {output / 'predictions.csv'}")
    return int(args.strict and metrics["scored"] < metrics["listed"])


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
