"""Steps that changed no weight, since a loss or a gradient was not finite: too many in a row are the end of a run."""

import itertools
import json
import math
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from grpo import distributed
from grpo.update import Batch, token_logprobs


class TooManyBadSteps(Exception):
    """Its text, one line, names the file that holds the last of them."""


class BadSteps:
    """Counts them, the same in every process. allowed: of so many in a row the last is the end; run: a folder."""

    def __init__(self, allowed: int, run: Path):
        self.allowed, self.run, self.in_a_row = allowed, run, 0

    def too_many(self, bad: bool) -> bool:
        """Whether this step, bad or not, is the end of the run."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return self.in_a_row >= self.allowed

    def end(
        self, step: int, rows: list[dict], policy: nn.Module, batch: Batch, sampled: Tensor, micro_batch: int
    ) -> NoReturn:
        """Write the step to `run`/bad_step_STEP.json and raise TooManyBadSteps, in all processes together.

        rows: one per answer of this process, in order; `sampled` (N, G, T), the sampler's log-probs. The policy's are
        those of the update, as no weight has changed since.
        """
        logprobs = token_logprobs(policy, batch, micro_batch)
        tokens = token_rows(batch, logprobs=logprobs, sampled=sampled, reference=batch.reference_logprobs)
        rows = [{**row, **of_tokens} for row, of_tokens in zip(rows, tokens)]
        every = distributed.gather_rows(rows, batch.ids.device)
        path = self.run / f"bad_step_{step:06d}.json"
        if distributed.is_main():
            path.write_text(json.dumps({"step": step, "answers": every}, ensure_ascii=False, allow_nan=False) + "\n")
        raise TooManyBadSteps(
            f"{self.in_a_row} steps in a row, the last of them {step}, have changed no weight: loss or gradient not "
            f"finite; {path} holds the last; go on from before them with --resume auto"
        )


def token_rows(batch: Batch, **numbers: Tensor | None) -> list[dict]:
    """For each answer its `tokens`, and those numbers (N, G, T) that there are of them; not finite ones as text."""
    rows, (N, G) = [], batch.advantages.shape
    for answer in itertools.product(range(N), range(G)):
        counts = batch.mask[answer]
        values = {name: value[answer][counts].tolist() for name, value in numbers.items() if value is not None}
        values = {name: [x if math.isfinite(x) else str(x) for x in row] for name, row in values.items()}
        rows.append({"tokens": batch.ids[answer][counts].tolist(), **values})
    return rows
