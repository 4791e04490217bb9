"""What happened in a step of GRPO, in numbers: each token's part in the loss, gradients by part, answers before, after.

A step is watched through hooks, and recomputed with the functions that it was made by; no other step pays for it.

Legend: N videos of this process, G answers per video, T answer tokens.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from grpo import distributed
from grpo.advantages import STD_FLOOR
from grpo.bad_steps import token_rows
from grpo.config import Config
from grpo.inspect_page import write_inspection
from grpo.loss import clip_acts, grpo_loss, kl_estimate
from grpo.update import Batch, joined, token_logprobs

UNREADABLE, LONGEST = "\ufffd", 4  # what bytes that are no text are decoded to; bytes of a character in UTF-8


@dataclass(frozen=True)
class Recording:
    """Of an update: the log-probs (n, G, t) of its forward passes, in order; norms of its last gradient, clipped."""

    logprobs: list[Tensor] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspector:
    """Writes the pages of --inspect.

    Args:
        policy: what `update` gets.
        parts: the parameters of the policy by the name of a part.
        decode: token ids to text.
        prompt: the text of what every video's frames are shown in.
    """

    folder: Path
    config: Config
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    parts: Mapping[str, Sequence[nn.Parameter]]
    decode: Callable[[list[int]], str]
    prompt: str

    @contextmanager
    def watching(self, step: int) -> Iterator[Recording | None]:
        """While it lasts an update leaves a Recording behind; None, and no hook, if the step is not to be inspected."""
        if not self.config.inspects(step):
            yield None
            return
        made = Recording()
        hooks = [
            self.policy.register_forward_hook(lambda module, inputs, out: made.logprobs.append(out.logprobs.detach())),
            self.optimizer.register_step_pre_hook(lambda *_: made.norms.update(gradient_norms(self.parts))),
        ]
        try:
            yield made
        finally:
            for hook in hooks:
                hook.remove()

    def write(
        self, step: int, batch: Batch, made: Recording, videos: list[dict], rows: list[dict], metrics: dict
    ) -> None:
        """Write step_000010.json and .html of a step, in all processes together.

        videos: one dict for each of N, JSON but for `pictures` (see `page.strip`), which only the page has; rows: one
        per answer, in order; metrics: those of the step, over all processes.
        """
        config = self.config
        passes = len(batch.split(config.micro_batch))
        logprobs = joined(made.logprobs[-passes:], batch)
        numbers = token_numbers(batch, logprobs, token_logprobs(self.policy, batch, config.micro_batch), config)
        sums = {"policy": numbers.pop("policy_loss"), "kl": numbers.pop("kl_loss")}
        G = batch.advantages.shape[1]
        answers = [self.answer(row, tokens) for row, tokens in zip(rows, token_rows(batch, **numbers))]
        videos = [video | {"answers": answers[n * G : n * G + G]} for n, video in enumerate(videos)]
        videos = distributed.gather_rows(videos, batch.ids.device)
        sums = distributed.total_of_each(sums, batch.ids.device)
        if distributed.is_main():
            clipping = max(1.0, ((metrics["grad_norm"] or 0.0) + 1e-6) / config.grad_clip)
            loss = {name: number(value) for name, value in sums.items()} | {"total": metrics["loss"]}
            norms = {} if metrics["grad_norm"] is None else made.norms
            found = {
                "step": step,
                "prompt": counted_repeats(self.prompt),
                "settings": settings(config),
                "loss": loss,
                "gradients": {name: norms[name] * clipping if name in norms else None for name in self.parts},
                "metrics": metrics,
                "videos": [video | {"group": group(video["answers"])} for video in videos],
            }
            write_inspection(self.folder, found)

    def answer(self, row: Mapping, tokens: Mapping) -> dict:
        """A row of rollouts.jsonl with the `tokens` of the answer and its log-probs, summed, `before` and `after`."""
        told = {name: row[name] for name in ("text", "score", "unparsed", "rewards", "reward", "advantage")}
        sums = {name: number(sum(map(float, tokens[name]))) for name in ("before", "after")}
        numbers = {name: values for name, values in tokens.items() if name != "tokens"}
        ids = tokens["tokens"]
        return {**told, **sums, "tokens": {"text": pieces(ids, self.decode), "ids": ids, **numbers}}


def pieces(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token. Of tokens that make up one character the last has it and the others are empty.

    What is no character, for want of a token or because of a wrong one, is U+FFFD in each token that is a part of it.
    """
    found, begun = [], []
    for token in ids:
        begun.append(token)
        if (text := decode(begun)).endswith(UNREADABLE) and len(begun) < LONGEST:
            continue
        found += [decode([token]) for token in begun] if UNREADABLE in text else [""] * (len(begun) - 1) + [text]
        begun = []
    return found + [decode([token]) for token in begun]


def settings(config: Config) -> dict:
    """What the numbers of a step were computed with."""
    names = ("steps", "temperature", "clip_low", "clip_high", "beta", "kl", "loss_mean")
    names += ("inner_epochs", "grad_clip", "advantage_std", "max_new_tokens")
    return {name: getattr(config, name) for name in names} | {"std_floor": STD_FLOOR}


def gradient_norms(parts: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, float]:
    """The norm of the gradients of each part that has any; a parameter that is tied counts once."""
    trained = {name: [p for p in dict.fromkeys(parameters) if p.grad is not None] for name, parameters in parts.items()}
    return {name: distributed.gradient_norm(those).item() for name, those in trained.items() if those}


def token_numbers(batch: Batch, logprobs: Tensor, after: Tensor, config: Config) -> dict[str, Tensor | float | None]:
    """What the loss makes of each token, all (N, G, T), and its two parts summed over this batch.

    logprobs: of the policy in the last pass of the update; after: behind it.

    `before`, `after`, `reference`: log-probs under the policy that sampled, the updated one, the reference. `ratio`: of
    the last pass, Eq. (3); `clipped`: -1 or 1 where it is out of its bounds and the clip acts, else 0; `kl`: Eq. (5).
    `policy_signal`, `kl_signal`: minus the derivative of a part of the loss by the token's log-prob. `signal`: minus
    that of the loss by the token's logit, which is smaller the surer the policy is of it; above 0 the token becomes
    likelier. `policy_loss`, `kl_loss`: numbers, whose sum is the loss.
    """
    before = logprobs if batch.old_logprobs is None else batch.old_logprobs
    options = {"clip_low": config.clip_low, "clip_high": config.clip_high, "beta": config.beta, "kl": config.kl}
    leaf = logprobs.detach().requires_grad_()

    def signal(advantages: Tensor, reference: Tensor | None) -> tuple[float, Tensor]:
        loss, _ = grpo_loss(leaf, before, reference, advantages, batch.mask, batch.weights, **options)
        return loss.item(), -torch.autograd.grad(loss, leaf)[0]

    policy_loss, policy_signal = signal(batch.advantages, None)
    reference, kl, kl_loss, kl_signal = batch.reference_logprobs, None, 0.0, None
    if reference is not None:
        kl = kl_estimate(logprobs.where(batch.mask, 0), reference.where(batch.mask, 0), config.kl)
        kl_loss, kl_signal = signal(torch.zeros_like(batch.advantages), reference)
    whole = policy_signal if kl_signal is None else policy_signal + kl_signal
    ratio = (logprobs - before).exp()
    low, high = clip_acts(ratio, batch.advantages[:, :, None], config.clip_low, config.clip_high)
    return {
        "before": before,
        "after": after,
        "reference": reference,
        "ratio": ratio,
        "clipped": high.int() - low.int(),
        "kl": kl,
        "weight": batch.weights,
        "policy_signal": policy_signal,
        "kl_signal": kl_signal,
        "signal": whole * (1 - logprobs.exp()) / config.temperature,
        "policy_loss": policy_loss,
        "kl_loss": kl_loss,
    }


def group(answers: Sequence[Mapping]) -> dict:
    """Mean and standard deviation of the rewards of a group, which its advantages are made with."""
    rewards = torch.tensor([answer["reward"] for answer in answers])
    return {"mean": rewards.mean().item(), "std": rewards.std().item()}


def counted_repeats(text: str) -> str:
    """The text with a tag that is repeated written once, and how often.

    >>> counted_repeats("<img><pad><pad><pad></img> What?")
    '<img><pad> × 3</img> What?'
    """
    return re.sub(r"(<[^<>]+>)\1+", lambda found: f"{found[1]} × {len(found[0]) // len(found[1])}", text)


def number(x: float) -> float | str:
    """JSON has no number for what is not finite."""
    return x if math.isfinite(x) else str(x)
