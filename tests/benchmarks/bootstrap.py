"""CPU time of bootstrap intervals and of a comparison of two models.

python -m tests.benchmarks.bootstrap
"""

import argparse
import time

import numpy as np

from rewards.metrics import correlations, intervals, paired_bootstrap


def scores_and_mos(videos: int, decimals: int) -> tuple[list[float], list[float]]:
    """Uniform MOS, and scores that follow them along a curve, with noise."""
    rng = np.random.default_rng(0)
    mos = rng.uniform(1, 5, videos)
    scores = 1 + 4 / (1 + np.exp(-(mos - 3) + rng.normal(0, 0.5, videos)))
    return scores.round(decimals).tolist(), mos.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=7000)
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples")
    args = parser.parse_args()
    print(f"{args.videos} videos, seconds of CPU time")
    for decimals in (12, 2):
        (scores, mos), (other, _) = scores_and_mos(args.videos, decimals), scores_and_mos(args.videos, 1)
        for name, measure, arguments in (
            ("metrics", correlations, (scores, mos)),
            (f"intervals, {args.resamples} resamples", intervals, (scores, mos, args.resamples)),
            (f"two models, {args.resamples} resamples", paired_bootstrap, (scores, other, mos, "srcc", args.resamples)),
        ):
            start = time.process_time()
            measure(*arguments)
            print(f"scores of {decimals} decimals: {name}: {time.process_time() - start:.2f}")


if __name__ == "__main__":
    main()
