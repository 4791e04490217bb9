"""A batch of answers as tensors. N videos, G answers per video."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.parse import REASONS, Parsed, parse_answer


@dataclass(frozen=True, eq=False)
class Answers:
    """What every reward sees. Built by `from_texts`; read-only.

    An unparsed answer is NaN in `scores`, and NaN is skipped by every statistic below. Scores come from text, so
    no gradient flows through them and a reward may mask NaN after its arithmetic.
    """

    texts: list[list[str]]  # N lists of G completions
    parsed: list[list[Parsed]]  # the same, read
    scores: Tensor  # (N, G) float32 in [1, 5], NaN where unparsed
    valid: Tensor  # (N, G) bool, True where parsed
    decimals: Tensor  # (N, G) int64, digits written after the point, -1 where unparsed
    mos: Tensor  # (N,) float32 mean opinion scores on the scale of the answers, 1 (bad) to 5 (excellent)

    @classmethod
    def from_texts(cls, texts: list[list[str]], mos: Tensor) -> Answers:
        """Parse N groups of G completions; tensors live where `mos` (N,) does.

        Raises ValueError if the groups are empty or of unequal size, or `mos` is not N finite numbers.

        >>> answers = Answers.from_texts([["<answer>3.1</answer>", "<answer>3.3</answer>", "3.5"]], torch.tensor([3.0]))
        >>> answers.valid.tolist(), answers.decimals.tolist()
        ([[True, True, False]], [[1, 1, -1]])
        >>> answers.count().item(), round(answers.mean().item(), 4), round(answers.variance().item(), 4)
        (2, 3.2, 0.02)
        """
        sizes = sorted({len(group) for group in texts})
        if len(sizes) != 1 or sizes[0] == 0:
            raise ValueError(f"texts must be N >= 1 groups of one size G >= 1, got sizes {sizes}")
        if mos.shape != (len(texts),) or not mos.isfinite().all():
            raise ValueError(f"mos must be {len(texts)} finite numbers, one per group, got {mos.tolist()}")
        parsed = [[parse_answer(text) for text in group] for group in texts]
        scores = [[float("nan") if p.score is None else p.score for p in group] for group in parsed]
        decimals = [[-1 if p.decimals is None else p.decimals for p in group] for group in parsed]
        scores = torch.tensor(scores, dtype=torch.float32, device=mos.device)
        return cls(texts, parsed, scores, ~scores.isnan(), torch.tensor(decimals, device=mos.device), mos.float())

    def count(self) -> Tensor:
        """(N,) int64: how many answers of each video parsed."""
        return self.valid.sum(-1)

    def mean(self) -> Tensor:
        """(N,) mean parsed score; NaN, not a made-up number, for a video without one."""
        return self.scores.nanmean(-1)

    def variance(self) -> Tensor:
        """(N,) unbiased variance of the parsed scores; 0 for a video with fewer than two."""
        squares = (self.scores - self.mean()[:, None]) ** 2
        return squares.nansum(-1) / (self.count() - 1).clamp(min=1)

    def failures(self) -> dict[str, int]:
        """Unparsed answers by reason, every reason of `REASONS` present."""
        found = Counter(p.reason for group in self.parsed for p in group)
        return {reason: found[reason] for reason in REASONS}
