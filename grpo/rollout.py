"""Sampling groups of answers from the current policy.

Legend: N videos, G answers per video, T answer tokens.
"""

import hashlib
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


class SamplingPolicy(Protocol):
    """What sampling needs of a policy; `models.policy.Policy` is one."""

    def encode(self, videos): ...

    def sample(self, prefix, uniforms: Tensor, top_p: float): ...

    def texts(self, completions) -> list[list[str]]: ...


@dataclass(frozen=True)
class Groups:
    """G answers to each of N videos.

    `ids`, `mask` (True where a token counts) and the sampler's `logprobs` are (N, G, T); `truncated` (N, G) is True for
    an answer that met the length limit before its end token; `texts` are N lists of G strings.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    truncated: Tensor
    texts: list[list[str]]

    def __getitem__(self, rows: slice) -> "Groups":
        return Groups(*(getattr(self, field.name)[rows] for field in fields(self)))


def answer_uniforms(seed: int, step: int, clip: int, G: int, T: int, copy: str = "raw") -> Tensor:
    """(G, T) numbers in [0, 1): the randomness of one clip's group at one step.

    A function of its arguments alone, so what is sampled does not depend on which rank or batch the clip is in; `copy`
    names the stream ('raw' or 'perturbed').
    """
    digest = hashlib.sha256(f"{seed}/{step}/{clip}/{copy}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(G, T, generator=generator)


@torch.no_grad()
def sample_groups(policy: SamplingPolicy, videos, uniforms: Tensor, top_p: float = 1.0) -> Groups:
    """G answers to each video, drawn from the policy, all videos together; `uniforms` is (N, G, T)."""
    completions = policy.sample(policy.encode(videos), uniforms, top_p)
    return Groups(*completions, policy.texts(completions))
