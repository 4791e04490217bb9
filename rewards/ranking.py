"""Ranking reward: does the score place its video rightly among the others of the step?

N videos of this process, G answers per video, M videos of the global step (M = N in a single process).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewards.answers import Answers

_EPS = 1e-6  # released code: keeps sqrt away from 0


class Opponents(NamedTuple):
    """Score statistics of all M videos of the global step, four tensors (M,).

    Across processes, gather them field by field: `Opponents(*map(gather, Opponents.from_answers(answers)))`.
    """

    mean: Tensor  # NaN where count is 0
    variance: Tensor
    mos: Tensor
    count: Tensor  # parsed answers; a video without one is nobody's opponent

    @classmethod
    def from_answers(cls, answers: Answers) -> Opponents:
        """The statistics of this process's own N videos."""
        return cls(answers.mean(), answers.variance(), answers.mos, answers.count())


class Comparisons(NamedTuple):
    """Every answer against every video of the global step; what is not `counted` is NaN or without meaning."""

    std: Tensor  # (N, M) of the score difference
    truth: Tensor  # (N, M): 1, 0 or 1/2 as the own MOS is above, below or equal
    win: Tensor  # (N, G, M): the probability that the answer places its video above
    fidelity: Tensor  # (N, G, M)
    counted: Tensor  # (N, M) bool: the opponents that have a parsed answer


class RankingReward(nn.Module):
    """Thurstone comparison with every opponent, scored by fidelity to the order of the MOS, averaged; 0 if unparsed.

    Source: released code (after VisualQuality-R1), which adds 1e-6 to the variance instead of a floor and compares
    only with the videos of the same GPU.

    Args:
        variance_floor: the least variance of a score difference. Without one, two groups that each agree with
            themselves make a gap of 0.01 a certain win. 0.04 is what two MOS differ by anyway when each has a
            standard error of 0.14 (25 ratings that spread by 0.7): a gap of 0.01 then wins with probability
            0.52, of 0.2 with 0.84.
        opponents: "all" other videos of the global step, or "one", the next of them: as many as the released script
            has, with two videos on a GPU.

    Raises ValueError unless variance_floor > 0, and for other opponents.
    """

    def __init__(self, variance_floor: float = 0.04, opponents: str = "all"):
        super().__init__()
        if not variance_floor > 0:
            raise ValueError(f"variance_floor must be above 0, got {variance_floor}")
        if opponents not in ("all", "one"):
            raise ValueError(f"opponents must be 'all' or 'one', got {opponents!r}")
        self.variance_floor, self.opponents = variance_floor, opponents

    def forward(self, answers: Answers, opponents: Opponents, own: Tensor) -> Tensor:
        """(N, G) in [0, 1.001]; 0 where there is no opponent. Arguments: see `compare`."""
        *_, fidelity, counted = self.compare(answers, opponents, own)
        fidelity = torch.where(counted[:, None] & answers.valid[..., None], fidelity, 0.0)
        return fidelity.sum(-1) / counted.sum(-1, keepdim=True).clamp(min=1)

    def compare(self, answers: Answers, opponents: Opponents, own: Tensor) -> Comparisons:
        """Every comparison that the reward is the mean of.

        `own` (N,) int64 is each video's own row of `opponents`, which it does not compete with. Answers to a
        perturbed copy compete with the other videos' unperturbed groups, under their own group's variance.
        """
        assert torch.equal(opponents.mos[own], answers.mos), "own does not name the rows of these videos"
        variance = answers.variance()[:, None] + opponents.variance  # (N, M)
        std = variance.clamp(min=self.variance_floor).sqrt()
        gap = answers.scores[..., None] - opponents.mean  # (N, G, M)
        win = torch.special.ndtr(gap / std[:, None])  # Eq. (9)
        truth = (torch.sign(answers.mos[:, None] - opponents.mos) + 1) / 2
        g = truth[:, None]
        fidelity = (win * g + _EPS).sqrt() + ((1 - win) * (1 - g) + _EPS).sqrt()  # Eq. (10)
        M = len(opponents.mos)
        ahead = (torch.arange(M, device=own.device) - own[:, None]) % M  # 0 is the video itself, 1 the next of the step
        met = ahead == 1 if self.opponents == "one" else ahead > 0
        return Comparisons(std, truth, win, fidelity, met & (opponents.count > 0))
