"""Advantages: each answer against its siblings."""

from torch import Tensor

STD_FLOOR = 1e-4  # added to the standard deviation, as in the released code


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """(N, G) advantages of (N, G) total rewards: deviation from the group's mean, over its standard deviation.

    A group whose rewards are all equal gets exactly 0, whatever rounding makes of its mean.

    >>> group_advantages(torch.tensor([[1.0, 3.0], [0.1, 0.1]]), divide_by_std=False).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_FLOOR)  # Eq. (2)
    return advantages.masked_fill(zero_variance(rewards)[:, None], 0)


def zero_variance(rewards: Tensor) -> Tensor:
    """(N,) True for groups whose rewards are all equal: they teach nothing."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)
