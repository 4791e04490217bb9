"""Sampling: the token loop that continues prompts, and what it draws with.

Legend: N videos, G answers per video, T answer tokens, P prompt tokens, V vocabulary; n <= N videos and g <= G answers
of each that are still in the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.cuda_graph import Recorded
from models.shared_prefix import GroupCache

SYNC_EVERY = {"cpu": 1}  # tokens between looks at which answers have ended; elsewhere 16: each look stalls the device


class Prefix(NamedTuple):
    """N prompts ready to be continued: keys and values, `logprobs` (N, V) of the first answer token, `length` P."""

    cache: GroupCache
    logprobs: Tensor
    length: int


class Completions(NamedTuple):
    """Sampled answers.

    `ids` (N, G, T); `mask` (N, G, T), True up to and including the end token; `logprobs` (N, G, T), of each token under
    the policy's full softmax at its temperature (0 where the mask is False); `truncated` (N, G), no end token.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    truncated: Tensor


def inverse_cdf(logprobs: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """Draw tokens (...) from log-probabilities (..., V), a pure function of `uniforms` (...) in [0, 1).

    With top_p < 1 only the smallest set of most likely tokens whose probability reaches top_p can be drawn.
    """
    probs = logprobs.double().exp()
    if top_p < 1:
        descending, order = probs.sort(dim=-1, descending=True)
        outside = descending.cumsum(-1) - descending >= top_p
        probs = probs.scatter(-1, order, descending.masked_fill(outside, 0))
    cdf = probs.cumsum(-1)
    target = uniforms[..., None].to(cdf) * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True)[..., 0].clamp_max(probs.shape[-1] - 1)


def remaining(alive: Tensor) -> tuple[Tensor, Tensor] | None:
    """What to go on with if it is half of the batch or less: videos (n,) of N, and slots (n, g) among their G answers.

    `alive` (N, G) tells which answers have no end yet; those that have one only fill up the rows of other videos.

    >>> remaining(torch.tensor([[True, False, False, False], [False] * 4, [False, True, False, True]]))
    (tensor([0, 2]), tensor([[0, 1], [1, 3]]))
    """
    videos, most = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
    if 2 * len(videos) * most > alive.numel():
        return None
    return videos, alive[videos].int().argsort(dim=1, descending=True, stable=True)[:, :most]


@torch.no_grad()
def continue_prefix(
    prefix: Prefix,
    G: int,
    T: int,
    choose: Callable[[Tensor, Tensor, Tensor], Tensor],
    step: Callable[[Tensor, Tensor, GroupCache], Tensor],
    end_ids: Tensor,
    pad_id: int,
    record: bool = False,
) -> Completions:
    """G answers to each prompt, of T tokens at most; those that have ended leave the batch when that halves it.

    Args:
        choose: log-probs (n, g, V), the answers (n, g) in 0 .. N * G - 1 that they are of, and t (1,) -> tokens (n, g).
        step: tokens (n, g), their position (1,), the cache with a slot for them -> log-probs (n, g, V) of the next.
        end_ids: tokens that end an answer. pad_id: what stands behind them.
        record: repeat the token step as a CUDA graph, recorded anew whenever answers leave the batch.
    """
    N, cache, device = len(prefix.logprobs), prefix.cache, prefix.logprobs.device
    ids = torch.full((N * G, T), pad_id, device=device)
    mask = torch.zeros(N * G, T, dtype=torch.bool, device=device)
    chosen = torch.zeros(N * G, T, device=device)
    truncated = torch.zeros(N * G, dtype=torch.bool, device=device)
    answers = torch.arange(N * G, device=device).view(N, G)
    alive = torch.ones(N, G, dtype=torch.bool, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)

    def draw(logprobs: Tensor) -> Tensor:
        """Token t of the answers that are in the batch, noted down."""
        token = choose(logprobs, answers, t).where(alive, pad_id)
        ids[answers, t], mask[answers, t] = token, alive
        chosen[answers, t] = logprobs.gather(-1, token[..., None])[..., 0].where(alive, 0)
        alive.logical_and_(~torch.isin(token, end_ids))
        return token

    def advance() -> None:
        """Read the tokens drawn last and draw the next: all in place, and all on the device."""
        cache.next_slot()
        logprobs = step(token, prefix.length + t, cache)
        t.add_(1)
        token.copy_(draw(logprobs))

    cache.begin_answers(T, same_shapes=record)
    token = draw(prefix.logprobs[:, None].expand(N, G, -1))
    again = Recorded(advance) if record else advance
    for drawn in range(1, T):
        if drawn % SYNC_EVERY.get(device.type, 16) == 0:
            if not alive.any():
                break
            if (left := remaining(alive)) is not None:
                videos, slots = left
                answers, alive, token = (x[videos].gather(1, slots) for x in (answers, alive, token))
                cache.keep(videos, slots)
                again = Recorded(advance) if record else advance
        again()
    truncated[answers] = alive
    longest = int(mask.any(0).sum())
    of_tokens = (x[:, :longest].view(N, G, longest) for x in (ids, mask, chosen))
    return Completions(*of_tokens, truncated.view(N, G))
