"""Attention for groups: G answers continue one prompt, and the prompt is never repeated.

A row of the packed batch is `[prompt | answer 1 | ... | answer G]`. The prompt attends to itself; each answer to
the prompt and to its own past, never to its siblings. Positions of every answer restart where the prompt ends, so each
answer computes exactly what it would compute alone behind its own copy of the prompt. During sampling the same layout
turns on its side: a row holds the newest token of each of the G answers, and keys and values live in a `GroupCache`.

The decoder's own code is unchanged: `shared_prefix_attention` is registered with transformers' AttentionInterface and
gets what it needs through two keyword arguments.

Legend: N videos (rows), G answers per video, P prompt tokens, T answer tokens, A = G * T, D channels of a head,
H query heads, K key/value heads (H is a multiple of K).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

NAME = "shared_prefix"


def packed_positions(P: int, G: int, T: int, device=None) -> Tensor:
    """(1, P + A) positions of a packed row: 0 .. P-1, then P .. P+T-1 for each answer."""
    answer = torch.arange(P, P + T, device=device).repeat(G)
    return torch.cat([torch.arange(P, device=device), answer])[None]


def past_mask(P: int, T: int, device: torch.device) -> Tensor:
    """(T, P + T) bool: what T answer tokens attend to among [prompt | answer], the last T rows of a causal mask.

    >>> past_mask(P=2, T=2, device=torch.device("cpu")).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]

    On CUDA the same as torch's `CausalBias`, with which flash attention needs no mask in memory.
    """
    if device.type == "cuda":
        return lower_right(T, P + T)
    return torch.ones(T, P + T, dtype=torch.bool, device=device).tril(P)


lower_right = lru_cache(maxsize=64)(causal_lower_right)  # kept, since modes that count operations cannot make one


class GroupCache:
    """Keys and values of N prompts, stored once, and of their N * G growing answers, for every layer.

    Filled by the attention function: `store_prompt` during the prefill, `append` once per layer and token step. Where a
    token goes is a tensor, so that nothing is read back from the device. With `same_shapes` a token step sees all slots
    from the start, so that it can be recorded once and repeated (`models.cuda_graph`); else those written so far.
    """

    def __init__(self):
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (N, K, P, D)

    def begin_answers(self, max_new_tokens: int, same_shapes: bool = False) -> None:
        """Forget the answers, if any, and make room for new ones behind the same prompts."""
        self.prompt_read = dict(self.prompt)  # of the videos that `keep` has left
        self.answers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (N, K, G, max_new_tokens, D)
        keys = self.prompt[min(self.prompt)][0]
        self.slot = torch.full((1,), -1, device=keys.device)  # of the newest token
        self.unwritten = keys.new_full((max_new_tokens,), -torch.inf)  # what is added to scores: 0 up to the slot
        self.same_shapes, self.seen = same_shapes, max_new_tokens if same_shapes else 0  # slots

    def next_slot(self) -> None:
        """Before the token step that fills it."""
        self.slot += 1
        self.seen += not self.same_shapes
        self.unwritten.index_fill_(0, self.slot, 0)

    def store_prompt(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.prompt[layer] = (key, value)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token's key and value (N, K, G, D); returns those of the slots seen, (N, K, G, seen, D)."""
        if layer not in self.answers:
            shape = (*key.shape[:3], len(self.unwritten), key.shape[3])
            self.answers[layer] = (key.new_zeros(shape), value.new_zeros(shape))  # no weight of 0 meets a NaN
        for slots, newest in zip(self.answers[layer], (key, value)):
            slots.index_copy_(3, self.slot, newest.unsqueeze(3))
        keys, values = self.answers[layer]
        return keys[:, :, :, : self.seen], values[:, :, :, : self.seen]

    def keep(self, videos: Tensor, slots: Tensor) -> None:
        """Go on with some videos (n,) and g answers of each, `slots` (n, g), and with as much less memory."""
        rows = videos[:, None]
        for layer, (key, value) in self.prompt_read.items():
            self.prompt_read[layer] = key[videos], value[videos]
        for layer, (keys, values) in self.answers.items():
            left = [x.transpose(1, 2)[rows, slots].transpose(1, 2).contiguous() for x in (keys, values)]
            self.answers[layer] = left[0], left[1]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, G: int, T: int, scale: float) -> Tensor:
    """Attention over packed rows; query (N, H, P + A, D), key and value (N, K, P + A, D). G = 0: a prompt alone.

    Returns (N, P + A, H, D), with heads behind tokens, as the kernels write it and the next layer reads it.

    Two calls, both causal: the prompt by itself, and each answer behind a copy of the prompt's keys and values. Those
    are few (K heads, one layer at a time), and no score between siblings is computed.
    """
    N, P = len(query), query.shape[2] - G * T
    attend = {"scale": scale, "enable_gqa": True}
    of_prompt, of_answers = zip(*(x.split([P, G * T], dim=2) for x in (query, key, value)))
    prompt = F.scaled_dot_product_attention(*of_prompt, is_causal=True, **attend).transpose(1, 2)
    if G * T == 0:
        return prompt
    own = [x.unflatten(2, (G, T)).transpose(1, 2) for x in of_answers]  # (N, G, heads, T, D)

    def behind_prompt(prompt: Tensor, answers: Tensor) -> Tensor:  # -> (N * G, K, P + T, D)
        return torch.cat([prompt[:, None].expand(-1, G, -1, -1, -1), answers], dim=3).flatten(0, 1)

    keys, values = map(behind_prompt, of_prompt[1:], own[1:])
    mask = past_mask(P, T, query.device)
    answers = F.scaled_dot_product_attention(own[0].flatten(0, 1), keys, values, attn_mask=mask, **attend)
    return torch.cat([prompt, answers.transpose(1, 2).unflatten(0, (N, G)).flatten(1, 2)], dim=1)


def token_attention(
    query: Tensor, prompt: tuple[Tensor, Tensor], answers: tuple[Tensor, Tensor], unwritten: Tensor, scale: float
) -> Tensor:
    """Attention of the newest token of each answer; query (N, H, G, D), prompt (N, K, P, D), answers (N, K, G, T, D).

    One softmax over [prompt | own past], its two parts computed where their keys are stored; `unwritten` (T,) is 0 for
    the past and -inf behind it. Returns (N, G, H, D).
    """
    N, H, G, D = query.shape
    K = prompt[0].shape[1]
    query = query.view(N, K, H // K, G, D).transpose(2, 3) * scale  # (N, K, G, H/K, D)
    to_prompt = (query.flatten(2, 3) @ prompt[0].mT).unflatten(2, (G, H // K))  # (N, K, G, H/K, P)
    to_own = query @ answers[0].mT + unwritten  # (N, K, G, H/K, T)
    weights = torch.cat([to_prompt, to_own], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    on_prompt, on_own = weights.split([to_prompt.shape[-1], to_own.shape[-1]], dim=-1)
    out = (on_prompt.flatten(2, 3) @ prompt[1]).unflatten(2, (G, H // K)) + on_own @ answers[1]
    return out.transpose(1, 2).reshape(N, G, H, D)


def shared_prefix_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    dropout=0.0,
    packed: tuple[int, int] | None = None,
    group_cache: GroupCache | None = None,
    **_,
):
    """transformers' attention interface: returns ((N, sequence, H, D), None).

    packed: (G, T) of rows `[prompt | answers]`, of which a cache, if given, keeps the prompt. None: the rows are the
    newest token of each answer, whose past is in the cache.
    """
    layer = module.layer_idx
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation leaves them in float32
    if packed is None:
        own = group_cache.append(layer, key, value)
        unwritten = group_cache.unwritten[: group_cache.seen]
        return token_attention(query, group_cache.prompt_read[layer], own, unwritten, scaling), None
    if group_cache is not None:
        group_cache.store_prompt(layer, key, value)
    return packed_attention(query, key, value, *packed, scaling), None


AttentionInterface.register(NAME, shared_prefix_attention)
