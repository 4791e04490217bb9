"""One update of the policy from one frozen batch of rollouts.

Legend: N videos of this rank, G answers per video, T answer tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo import distributed
from grpo.config import Config
from grpo.loss import grpo_loss, token_weights
from grpo.rollout import Groups
from grpo.runlog import Phases

PER_TOKEN = ("ids", "mask", "weights", "old_logprobs", "reference_logprobs")  # of a batch: (N, G, T)


@dataclass(frozen=True)
class Batch:
    """Everything an update needs, fixed before it starts: N videos, their answers and what does not change.

    `ids`, `mask`, `weights` (N, G, T); `advantages` (N, G); `old_logprobs`, `reference_logprobs` (N, G, T) or None;
    `tokens`, the number of answer tokens of the whole step, over all ranks.
    """

    videos: object
    ids: Tensor
    mask: Tensor
    weights: Tensor
    advantages: Tensor
    tokens: int
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most `size` videos, without what is behind the longest answer of each."""
        per_video = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}
        longest, parts = self.mask.sum(-1).amax(1).tolist(), []
        for start in range(0, len(self.ids), size):
            rows, T = slice(start, start + size), max(longest[start : start + size])
            part = {name: value[rows] for name, value in per_video.items() if value is not None}
            part |= {name: value[..., :T] for name, value in part.items() if name in PER_TOKEN}
            parts.append(replace(self, **part))
        return parts


def freeze(
    videos, groups: Groups, advantages: Tensor, policy: nn.Module, reference: Callable | None, config: Config
) -> Batch:
    """The `Batch` of a step: masks, token weights, reference log-probs, and old ones if there is a second inner epoch.

    With one inner epoch the old policy is the current one, so its log-probs are those of the update itself.
    """
    answers = config.videos_per_step * config.group_size
    tokens = int(distributed.total(groups.mask.sum()))
    weights = token_weights(groups.mask, config.loss_mean, answers, tokens, config.max_new_tokens)
    batch = Batch(videos, groups.ids, groups.mask, weights, advantages, tokens)
    old = token_logprobs(policy, batch, config.micro_batch) if config.inner_epochs > 1 else None
    ref = token_logprobs(reference, batch, config.micro_batch) if reference is not None else None
    return replace(batch, old_logprobs=old, reference_logprobs=ref)


@torch.no_grad()
def token_logprobs(policy: Callable, batch: Batch, micro_batch: int) -> Tensor:
    """(N, G, T) without gradient, in the micro-batches of the update, so that equal weights give equal numbers.

    0 behind the longest answer of a micro-batch.
    """
    return joined([policy(part.videos, part.ids).logprobs for part in batch.split(micro_batch)], batch)


def joined(parts: Sequence[Tensor], batch: Batch) -> Tensor:
    """(N, G, T) of the micro-batches' (n, G, t), with 0 behind what they hold."""
    return torch.cat([F.pad(part, (0, batch.ids.shape[-1] - part.shape[-1])) for part in parts])


def update(
    policy: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float, config: Config, phases: Phases
) -> dict[str, float | None]:
    """`inner_epochs` passes of the clipped objective over the batch, one optimizer step each; the last pass's metrics.

    `policy` is the (possibly wrapped) module with `forward(videos, ids)`; `rate` is the learning rate. A gradient or
    a loss that is not finite on any rank changes no weight: the optimizer step is left out, on all ranks alike, and
    counted in `skipped`. A metric that is not finite is None.
    """
    skipped = 0
    for group in optimizer.param_groups:
        group["lr"] = rate
    for _ in range(config.inner_epochs):
        optimizer.zero_grad()
        sums = dict.fromkeys(("loss", "ratio", "clipped_low", "clipped_high", "kl", "entropy"), 0.0)
        parts = batch.split(config.micro_batch)
        for part in parts:
            with distributed.accumulate(policy, last=part is parts[-1]):
                with phases("forward"):
                    out = policy(part.videos, part.ids)
                    loss, terms = grpo_loss(
                        out.logprobs,
                        out.logprobs.detach() if part.old_logprobs is None else part.old_logprobs,
                        part.reference_logprobs,
                        part.advantages,
                        part.mask,
                        part.weights,
                        clip_low=config.clip_low,
                        clip_high=config.clip_high,
                        beta=config.beta,
                        kl=config.kl,
                    )
                with phases("backward"):
                    scale = distributed.world_size()  # gradients are averaged over ranks; the loss is a sum
                    (loss * (scale + 0 * loss.detach())).backward()  # one that is not finite has no finite gradient
            terms = {"loss": loss.detach(), "entropy": out.entropy[part.mask].sum(), **terms}
            sums = {name: sums[name] + terms[name].double() for name in sums}
        with phases("optimizer"):
            grad_norm = distributed.clip_gradients(policy.parameters(), config.grad_clip)
            if torch.isfinite(grad_norm):
                optimizer.step()
            else:
                skipped += 1
    sums = distributed.total_of_each(sums, batch.mask.device)
    per_token = {name: value / max(batch.tokens, 1) for name, value in sums.items() if name != "loss"}
    metrics = {"loss": sums["loss"], **per_token, "grad_norm": grad_norm.item()}
    metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {**metrics, "tokens": batch.tokens, "skipped": skipped}
