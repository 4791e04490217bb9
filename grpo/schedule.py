"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from grpo.config import Config


def learning_rate(step: int, config: Config) -> float:
    """Rate of update `step` (from 0): linear warm-up to `lr`, then constant, or a half cosine to 0 behind the last."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.lr * (1 + math.cos(math.pi * done)) / 2
