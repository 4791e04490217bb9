"""Regression reward: how near is the score to the mean opinion score? N videos, G answers per video."""

import torch
from torch import Tensor, nn

from rewards.answers import Answers


class RegressionReward(nn.Module):
    """exp(-(score - mos)^2 / (2 sigma^2)), scaled down if fewer than two decimals were written; 0 if unparsed.

    Source: released code, which counts the decimals of the converted number and so also scales down "3.50" and
    "4.00"; here they are counted in the text.

    Args:
        sigma: width of the bell on the 1 to 5 scale; a score that far off earns exp(-1/2) = 0.61.
        coarse_factor: what remains for an answer with fewer than two decimals; 1 ignores decimals.

    Raises ValueError unless sigma > 0 and 0 <= coarse_factor <= 1.
    """

    def __init__(self, sigma: float = 0.5, coarse_factor: float = 0.8):
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma must be above 0, got {sigma}")
        if not 0 <= coarse_factor <= 1:
            raise ValueError(f"coarse_factor must lie in [0, 1], got {coarse_factor}")
        self.sigma, self.coarse_factor = sigma, coarse_factor

    def forward(self, answers: Answers) -> Tensor:
        """(N, G) in [0, 1]."""
        reward = self.factor(answers) * self.bell(answers.scores - answers.mos[:, None])
        return torch.where(answers.valid, reward, 0.0)

    def bell(self, error: Tensor) -> Tensor:
        """The reward of scores that are so far from the MOS, if their decimals were written."""
        return torch.exp(-(error**2) / (2 * self.sigma**2))  # Eq. (8)

    def factor(self, answers: Answers) -> Tensor:
        """(N, G): what the written decimals leave of it."""
        return torch.where(answers.decimals < 2, self.coarse_factor, 1.0)
