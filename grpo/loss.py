"""The clipped GRPO objective as a pure function of tensors.

Legend: N videos, G answers per video, T answer tokens. A token's weight already holds the global denominator, so losses
and metrics of micro-batches and of ranks add up to those of the whole step.
"""

import torch
from torch import Tensor


def token_weights(mask: Tensor, mean: str, answers: int, tokens: int, max_tokens: int) -> Tensor:
    """Weight (N, G, T) of each token's term in the loss; masked tokens weigh 0.

    mean: 'sequence' averages over an answer's tokens, then over answers (GRPO); 'token' over all tokens of the step
    (DAPO); 'constant' over answers x `max_tokens`, so that length does not matter (Dr. GRPO).
    answers, tokens: how many the whole step has, over all micro-batches and ranks.
    """
    if mean == "sequence":
        return mask / (mask.sum(-1, keepdim=True).clamp_min(1) * answers)
    if mean == "token":
        return mask / max(tokens, 1)
    if mean == "constant":
        return mask / (answers * max_tokens)
    raise ValueError(f"--loss-mean {mean}: choose one of sequence, token, constant")


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token estimate (N, G, T) of KL(policy || reference) from tokens that the policy sampled.

    k1 is unbiased and can be negative, k2 is biased, k3 is unbiased and never negative (Schulman, 2020).
    As a loss, k1 has an expected gradient of zero on-policy: it is here for comparison.
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.exp() - log_ratio - 1  # Eq. (5)
    raise ValueError(f"--kl {estimator}: choose one of k1, k2, k3")


def clip_acts(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where (N, G, T) the objective has stopped to grow, below and above; ratio (N, G, T), advantages (N, G, 1)."""
    return (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the clipped surrogate plus beta times the KL, summed with `weights`.

    Args:
        logprobs: (N, G, T) under the policy, with gradient.
        old_logprobs: (N, G, T) under the policy that sampled.
        reference_logprobs: (N, G, T) under the frozen reference; None without a KL term.
        advantages: (N, G).
        mask: (N, G, T), True where a token counts.
        weights: (N, G, T) from `token_weights`.

    Returns the loss and sums over this batch's tokens: `ratio`, `clipped_low`, `clipped_high`, `kl`; divide them by the
    step's token count.
    """
    # Masked positions are set to "no change" before any exp: an overflow there would give NaN gradients.
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).exp()  # Eq. (3)
    advantages = advantages[:, :, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # Eq. (4)
    low, high = clip_acts(ratio, advantages, clip_low, clip_high)
    sums = {
        "ratio": ratio.detach()[mask].sum(),
        "clipped_low": low.sum(),
        "clipped_high": high.sum(),
        "kl": logprobs.new_zeros(()),
    }
    if reference_logprobs is not None:
        divergence = kl_estimate(logprobs.where(mask, 0), reference_logprobs.where(mask, 0), kl)
        objective = objective - beta * divergence
        sums["kl"] = divergence.detach().sum()
    return -(weights * objective).sum(), sums  # Eq. (6)
