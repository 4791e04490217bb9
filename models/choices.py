"""Candidates as the continuations of one prompt: which one a policy finds the most likely.

Legend: N questions, V videos of each (1 or 2), F frames of a video, S side in pixels, P prompt tokens, G candidates,
T tokens of the longest, K dense clips of L frames each.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.policy import Policy, Videos


class Watched(NamedTuple):
    """One video as shown, uint8: `frames` (F, 3, S, S) and, where SlowFast sees others, `clips` (K, L, 3, S, S)."""

    frames: Tensor
    clips: Tensor | None


@torch.no_grad()
def show(policy: Policy, rows: Sequence[Sequence[Watched]], prompt_ids: Tensor) -> Videos:
    """N questions about V videos each, with the visual tokens and the motion feature computed.

    prompt_ids: (N, P), with the slots of V * F frames. A prompt has one motion token; about a pair it is made of the
    mean of both videos' features, so it says what moves in the two together, and nothing of either alone.
    """
    N, V = len(rows), len(rows[0])
    frames = torch.stack([video.frames for row in rows for video in row])
    with policy.autocast():
        videos = Videos(frames.unflatten(0, (N, V)).flatten(1, 2), prompt_ids)
        if policy.has_motion:
            clips = [video.clips for row in rows for video in row]
            alone = Videos(frames, prompt_ids, motion_clips=None if clips[0] is None else torch.stack(clips))
            videos = replace(videos, motion=policy.motion_features(alone).unflatten(0, (N, V)).mean(1))
        return replace(videos, visual=policy.visual_tokens(videos))


def candidate_ids(policy: Policy, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """The tokens (N, G, T) of G texts for each question, padded, and which of them count, (N, G, T) bool.

    The tokens that all texts of a question begin with do not count: they are equally likely in each. A text that the
    others only continue keeps its last token.
    """
    every = [[policy.tokenizer(text, add_special_tokens=False).input_ids for text in group] for group in texts]
    T = max(len(ids) for group in every for ids in group)
    tokens = torch.full((len(every), len(every[0]), T), policy.pad_id)
    counted = torch.zeros(tokens.shape, dtype=torch.bool)
    for n, group in enumerate(every):
        shared = min(map(len, group)) - 1
        shared = next((t for t in range(shared) if len({ids[t] for ids in group}) > 1), shared)
        for g, ids in enumerate(group):
            tokens[n, g, : len(ids)] = torch.tensor(ids)
            counted[n, g, shared : len(ids)] = True
    return tokens, counted


@torch.no_grad()
def candidate_logprobs(policy: Policy, videos: Videos, texts: Sequence[Sequence[str]]) -> Tensor:
    """(N, G) mean log-probability of a text's counted tokens, behind the prompt that all G share."""
    tokens, counted = (x.to(policy.device) for x in candidate_ids(policy, texts))
    logprobs = policy(videos, tokens).logprobs
    return (logprobs * counted).sum(-1) / counted.sum(-1)
