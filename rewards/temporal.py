"""Temporal reward: is a video judged better than its copy with frames out of order?

N videos of this process, G answers per video.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

BASE_TERMS = ("ranking", "regression")
_TIE = 1e-6  # the same answers in another order give means that differ by float32 rounding


class TemporalReward(nn.Module):
    """`bonus` for answers with a high base reward, where the group beats the group that saw the perturbed copy.

    For each base term given (`ranking`, `regression`): if its mean over a video's answers exceeds its mean over the
    answers to the perturbed copy, every answer whose own base value exceeds the threshold earns `bonus`. The base
    values themselves stay as they are, and an unparsed answer counts with the 0 it was given.

    Source: R_raw > R_perturbed is the paper's figure; bonus and thresholds are the released code's, which compares
    with >= (`ties_win=True`) over its local batch (`scope="batch"`) and adds the bonus into the base term.

    Args:
        bonus: reward per base term.
        scope: "video" compares each video with its own copy, "batch" the means over all videos of the global step.
        ties_win: whether equal means (to 1e-6) earn the bonus.
        ranking_threshold, regression_threshold: base value that an answer must exceed.

    Raises ValueError for another scope.
    """

    def __init__(
        self,
        bonus: float = 0.3,
        scope: str = "video",
        ties_win: bool = False,
        ranking_threshold: float = 0.5,
        regression_threshold: float = 0.9,
    ):
        super().__init__()
        if scope not in ("video", "batch"):
            raise ValueError(f"scope must be 'video' or 'batch', got {scope!r}")
        self.bonus, self.scope, self.margin = bonus, scope, -_TIE if ties_win else _TIE
        self.thresholds = dict(zip(BASE_TERMS, (ranking_threshold, regression_threshold)))

    def forward(
        self,
        raw: Mapping[str, Tensor],
        perturbed: Mapping[str, Tensor],
        perturbed_ok: Tensor,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Tensor:
        """(N, G), from 0 to `bonus` times the number of base terms.

        `perturbed` maps base terms to (N, G) values, `raw` those and any other terms. `perturbed_ok` (N,) bool is False
        where the clip could not be perturbed: such a video earns 0 and enters no mean. `sum_over_ranks` is called in
        batch scope only, once per base term, with a tensor of no dimension.
        """
        parts = []
        for name, worse in perturbed.items():
            won = perturbed_ok & (self.gain(raw[name], worse, perturbed_ok, sum_over_ranks) > self.margin)
            parts.append(self.bonus * (won[:, None] & (raw[name] > self.thresholds[name])))  # Eq. (11)
        return torch.stack(parts).sum(0)

    def gain(
        self, raw: Tensor, perturbed: Tensor, perturbed_ok: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(N,) of how much one base term's (N, G) values beat the copies' on average; in batch scope () of all."""
        gain = raw.mean(-1) - perturbed.mean(-1)
        if self.scope == "batch":
            # The sum over the videos has the sign of the difference of the means, whatever their number.
            gain = sum_over_ranks(torch.where(perturbed_ok, gain, 0.0).sum())
        return gain
