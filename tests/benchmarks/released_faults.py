"""Which faults of the released code matter? The demo's ablation with one of them at a time switched on.

    python -m tests.benchmarks.released_faults             # beside the other rows, in the folder of grpo.ablate
    python -m tests.benchmarks.released_faults --table

The tiny model writes few answers that cannot be read, so random scores are tried twice: as it is, and, in the folder
`cut`, with a baseline of its own, with answers of 31 tokens at most, which cuts a third of them off. A third fault, a
single opponent in the ranking, is a flag and so among the rows of grpo.ablate.

    python -m tests.benchmarks.released_faults FAULT ...   # train.py with this fault; what the rows above run
"""

import dataclasses
import random
import sys
from collections.abc import Mapping

from torch import Tensor

import models.policy
import rewards.answers
import train
from grpo.ablate import BASELINE, DEMO, Row, parser, run
from grpo.config import parse_config
from models.sampling import inverse_cdf
from rewards.parse import Parsed, parse_answer

TOP_K = 50
CUT = "--max-new-tokens 31"
THIS = "tests.benchmarks.released_faults"


def with_random_score(text: str) -> Parsed:
    """What the parser reads; where it reads no score, one drawn from 1 to 5, and still the reason why."""
    parsed = parse_answer(text)
    if parsed.score is not None:
        return parsed
    return dataclasses.replace(parsed, score=round(random.uniform(1, 5), 2), decimals=2)


def top_k(logprobs: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """Draw among the TOP_K most likely tokens; the log-probabilities that are kept stay those of the full softmax."""
    least = logprobs.topk(min(TOP_K, logprobs.shape[-1])).values[..., -1:]
    return inverse_cdf(logprobs.masked_fill(logprobs < least, float("-inf")), uniforms, top_p)


FAULTS = {  # by name: what is replaced, by what
    "random-score": (rewards.answers, "parse_answer", with_random_score),
    "top-k": (models.policy, "inverse_cdf", top_k),
}


def rows(flags: str, faults: Mapping[str, str]) -> list[Row]:
    """The baseline with these flags, and a row for each fault by its name."""
    given = tuple(flags.split())
    return [Row("", BASELINE, given), *(Row("faults", name, given, (THIS, fault)) for name, fault in faults.items())]


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in FAULTS:
        module, name, faulty = FAULTS[sys.argv[1]]
        setattr(module, name, faulty)
        random.seed(0)
        return train.main(parse_config(sys.argv[2:]))
    args = parser(THIS, __doc__.splitlines()[0]).parse_args()
    failed = run(rows(DEMO, {"top-k 50": "top-k", "random score": "random-score"}), args, "released_faults")
    args.out /= "cut"
    return run(rows(f"{DEMO} {CUT}", {"random score": "random-score"}), args, "released_faults") or failed


if __name__ == "__main__":
    sys.exit(main())
