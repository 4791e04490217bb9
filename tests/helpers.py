"""A small random policy and what to feed it. Legend: N videos, F frames, G answers per video, T answer tokens."""

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from grpo.advantages import group_advantages
from grpo.rollout import Groups
from models.internvl import VQAThinker, VQAThinkerConfig
from models.loading import ATTENTION
from models.policy import Policy, Videos
from models.tiny.pretrain import make_policy, make_tokenizer


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(300)


def tiny_policy(seed: int = 0, temperature: float = 1.0, ends: list[int] | None = None) -> Policy:
    """Random weights, large enough for every token to depend visibly on all that it attends to."""
    made = make_policy(tokenizer(), seed)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if parameter.dim() == 2:
                parameter *= 5
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    if ends is not None:
        made.model.generation_config.eos_token_id = ends
    return Policy(made.model, made.tokenizer, made.image_processor, temperature)


def motion_policy(seed: int = 0, frames: int = 2, **settings: int) -> Policy:
    """`tiny_policy` with a motion token from a small SlowFast, set for so many frames or as told; random weights."""
    plain = tiny_policy(seed)
    stride, steps = frames // -(-frames // 4), -(-frames // 4)
    motion = {"slow_width": 4, "fast_width": 1, "depths": (1, 1), "slow_stride": stride, "temporal_repeat": 2}
    motion |= {"pool_frames": (2 * steps, frames), "pool_side": 3, **settings}
    config = VQAThinkerConfig.from_dict({**plain.model.config.to_dict(), "motion": motion})
    torch.manual_seed(seed)
    model = VQAThinker._from_config(config, attn_implementation=ATTENTION)
    model.load_state_dict(plain.model.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.model.motion_projector.named_parameters():
            parameter.normal_(std=0.3 if name.endswith("weight") else 0.1)
    model.generation_config = plain.model.generation_config
    return Policy(model, plain.tokenizer, plain.image_processor).train()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_videos(policy: Policy, N: int, F: int = 2, seed: int = 0) -> Videos:
    shape = (N, F, 3, policy.image_side, policy.image_side)
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed))
    prompt_ids = policy.prompt_ids("Judge.", lambda images, motion="": f"Here: {'; '.join(images)} {motion}. Well?", F)
    return Videos(frames, prompt_ids.expand(N, -1))


def some_ids(policy: Policy, N: int, G: int, T: int, seed: int = 0) -> Tensor:
    """(N, G, T) answer tokens, none of them an image token, for which plain transformers would want an image."""
    ids = torch.randint(len(policy.tokenizer) - 1, (N, G, T), generator=generator(seed))
    return ids + (ids >= policy.model.config.image_token_id)


def ragged_mask(N: int, G: int, T: int, seed: int = 0) -> Tensor:
    """(N, G, T), True up to a random length of at least 1."""
    return torch.arange(T) < torch.randint(1, T + 1, (N, G, 1), generator=generator(seed))


def rollouts(policy: Policy, N: int, G: int, T: int, seed: int = 0) -> tuple[Videos, Groups, Tensor]:
    """Videos, groups whose answers differ in length, and advantages (N, G): what `freeze` takes."""
    mask = ragged_mask(N, G, T, seed)
    groups = Groups(some_ids(policy, N, G, T, seed), mask, torch.zeros(N, G, T), ~mask[..., -1], [[""] * G] * N)
    advantages = group_advantages(torch.randn(N, G, generator=generator(seed)))
    return some_videos(policy, N, F=1, seed=seed), groups, advantages


def parameters(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def sgd(policy: Policy) -> torch.optim.Optimizer:
    """Its step, unlike Adam's, is proportional to the gradient; `update` is told the rate and sets it."""
    return torch.optim.SGD(policy.parameters(), lr=1e9)


def plain_model(policy: Policy, attention: str = "eager") -> InternVLForConditionalGeneration:
    """The same network and weights under transformers' own attention."""
    config = copy.deepcopy(policy.model.config)
    model = type(policy.model)._from_config(config, attn_implementation=attention, dtype=policy.model.dtype)
    model.load_state_dict(policy.model.state_dict())
    return model


def relative(actual: Tensor, expected: Tensor) -> float:
    """Size of the difference over the size of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()
