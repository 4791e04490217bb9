"""A score as an expectation over all numbers that the policy could have written.

Behind a prompt, a reasoning and `<answer>`, a number s = "1.00", "1.01", ..., "5.00" has the probability

    p(s) = prod_t pi(token t of s | prompt, reasoning, "<answer>", the tokens of s before t)

The score is m = sum_s p(s) s / M with M = sum_s p(s), and its spread the square root of sum_s p(s) (s - m)^2 / M. M is
what the policy gives to numbers of the form that it is asked for; the rest is for 4.5, 12 or words. Q-Align (arXiv
2312.17090) takes such a mean over words for five levels; here the numbers are those that the policy writes anyway.

p is exact, not approximated by the first digit. Numbers share their first tokens: with one token a digit, 41 beginnings
("1.0" to "5.0") of three tokens each carry all 401.

Legend: M numbers, L tokens of the longest, R beginnings, B tokens of an answer up to the tag, V vocabulary.
"""

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from models.policy import Policy, Videos

NUMBERS = tuple(f"{k / 100:.2f}" for k in range(100, 501))
OPENING, CLOSING = "<answer>", "</answer>"


class Expectation(NamedTuple):
    """`value` in 1..5, its `spread`, and the probability `mass` of all NUMBERS together."""

    value: float
    spread: float
    mass: float


class NumberTokens(NamedTuple):
    """NUMBERS in tokens: `ids` (M, L), -1 behind the end; `beginning` (M,), which of `beginnings` (R, L) each has.

    A beginning is all but the last token; what stands behind it is any token that ends no answer.
    """

    ids: Tensor
    beginnings: Tensor
    beginning: Tensor


def number_tokens(tokenizer) -> NumberTokens:
    """Raises ValueError naming --score if the tokenizer joins a number with the tags around it."""

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    opening, closing = ids_of(OPENING), ids_of(CLOSING)
    numbers = []
    for number in NUMBERS:
        ids = ids_of(OPENING + number + CLOSING)
        own = ids[len(opening) : len(ids) - len(closing)]
        if ids != opening + own + closing or tokenizer.decode(own) != number:
            parts = " ".join(map(repr, map(tokenizer.decode, ids)))
            raise ValueError(f"--score expected: this tokenizer joins {number} with the tags around it: {parts}")
        numbers.append(own)
    L, filler = max(map(len, numbers)), numbers[0][0]
    beginnings = list(dict.fromkeys(tuple(ids[:-1]) for ids in numbers))
    return NumberTokens(
        torch.tensor([ids + [-1] * (L - len(ids)) for ids in numbers]),
        torch.tensor([[*ids, *[filler] * (L - len(ids))] for ids in beginnings]),
        torch.tensor([beginnings.index(tuple(ids[:-1])) for ids in numbers]),
    )


def up_to_the_tag(tokenizer, ids: list[int]) -> list[int] | None:
    """The tokens of an answer up to and with its first `<answer>`; None if it has none.

    A token that has more than the end of the tag in it, such as `></`, is replaced by those of the tag's end.
    """
    through = bisect_left(range(len(ids) + 1), True, key=lambda t: OPENING in tokenizer.decode(ids[:t]))
    if through > len(ids):
        return None
    text, before = tokenizer.decode(ids[:through]), tokenizer.decode(ids[: through - 1])
    if not text.partition(OPENING)[2].strip():
        return ids[:through]
    rest = text[len(before) : text.index(OPENING) + len(OPENING)]
    return ids[: through - 1] + tokenizer(rest, add_special_tokens=False).input_ids


@torch.no_grad()
def number_logprobs(policy: Policy, video: Videos, begun: Tensor, numbers: NumberTokens) -> Tensor:
    """(M,) log-probabilities, float64, of NUMBERS behind the tokens `begun` (B,) of an answer to one video."""
    ids, beginnings, beginning = (x.to(policy.device) for x in numbers)
    (R, L), found = beginnings.shape, torch.zeros(ids.shape, dtype=torch.float64, device=policy.device)

    def choose(logprobs: Tensor, answers: Tensor, t: Tensor) -> Tensor:
        """Read off token t of every number, and go on along the beginnings; logprobs (1, R, V)."""
        found[:, t] = logprobs[0][beginning[:, None], ids[:, t].clamp_min(0)].double()
        return beginnings[answers, t]

    policy.follow(policy.encode(video, begun[None]), R, L, choose)
    return found.where(ids >= 0, 0).sum(1)


def expectation(logprobs: Tensor) -> Expectation:
    """The mean and the spread of NUMBERS under log-probabilities (M,), normalised over them.

    >>> logprobs = torch.full((401,), -torch.inf, dtype=torch.float64)
    >>> logprobs[[100, 300]] = torch.tensor([0.25, 0.25]).double().log()  # 2.00 and 4.00
    >>> expectation(logprobs)
    Expectation(value=3.0, spread=1.0, mass=0.5)
    """
    values = torch.arange(100, 501, dtype=torch.float64, device=logprobs.device) / 100
    weights = logprobs.softmax(0)
    mean = (weights * values).sum()
    spread = (weights * (values - mean) ** 2).sum().sqrt()
    return Expectation(mean.item(), spread.item(), logprobs.exp().sum().item())
