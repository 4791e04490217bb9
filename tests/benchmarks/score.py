"""Time of scoring video files: one at a time through transformers' own `generate`, and ours, in one process.

    python -m tests.benchmarks.score
    python -m tests.benchmarks.score --samples 8

The tiny model without its motion token, on synthetic clips that are written first. Both ways start from files. The
plain one decodes a file and answers it before the next, each of K samples with its own copy of the prompt; ours is
`models.scorer.Scorer`. A round runs both, after a first one that does not count, and in each their scores must be
equal. Prints one JSON object: the median seconds of each way, and the median and the range of the rounds' ratios.

Legend: K answers per video, T answer tokens.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from data import synthetic
from data.recipe import Recipe
from data.video import read_frames, resize_square
from data.video_files import video_files
from grpo.config import TINY_MODEL
from models.loading import load_policy
from models.policy import Videos
from models.scorer import Scorer, of_answers
from tests.plain import PlainPolicy


@torch.no_grad()
def plain_score(plain: PlainPolicy, scorer: Scorer, path: str) -> float | None:
    """The score of one file: decoded, resized, answered, read."""
    recipe, policy = scorer.recipe, scorer.policy
    pixels = resize_square(read_frames(path, recipe.make_sampler()).pixels, policy.image_side)
    videos = Videos(pixels[None], scorer.prompt_ids[None])
    if scorer.samples:
        return of_answers(policy.texts(plain.sample(videos, scorer.uniforms(path)[None]))[0])["value"]
    inputs = plain.repeated(videos, 1)
    out = plain.model.generate(
        **inputs._asdict(),
        attention_mask=torch.ones_like(inputs.input_ids),
        do_sample=False,
        max_new_tokens=recipe.max_new_tokens,
        eos_token_id=plain.end_ids.tolist(),
        pad_token_id=plain.pad_id,
    )
    answer = out[0, inputs.input_ids.shape[1] :]
    return of_answers([policy.tokenizer.decode(answer[~torch.isin(answer, plain.end_ids)])])["value"]


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    policy = load_policy(TINY_MODEL, motion="none").eval()
    scorer = Scorer(policy, Recipe.of(TINY_MODEL), samples=args.samples, batch=args.batch, workers=args.workers)
    plain = PlainPolicy(policy).eval()
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with TemporaryDirectory() as folder:
        synthetic.write_clips(Path(folder) / "clips", {"test": args.videos})
        paths = [str(path) for path in video_files(folder)]
        ways = {
            "plain": lambda: [plain_score(plain, scorer, path) for path in paths],
            "ours": lambda: [score.value for score in scorer.scores(paths)],
        }
        for _ in range(args.rounds + 1):
            found = {}
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way()
                seconds[name].append(time.perf_counter() - start)
            assert found["plain"] == found["ours"] and len(found["ours"]) == args.videos
    ratios = [plain / ours for plain, ours in zip(*(times[1:] for times in seconds.values()))]
    return {
        **vars(args),
        "seconds": {name: median(times[1:]) for name, times in seconds.items()},
        "ratio": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
        "scored": sum(value is not None for value in found["ours"]),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=48, help="clips (default: 48)")
    parser.add_argument("--samples", type=int, default=0, help="K, 0 for one greedy answer (default: 0)")
    parser.add_argument("--batch", type=int, default=16, help="videos per forward pass of ours (default: 16)")
    parser.add_argument("--workers", type=int, default=2, help="videos that ours decodes at a time (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default: 1)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(measure(parse_arguments()), indent=1))
