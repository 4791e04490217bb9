"""An answer to a multiple choice question: which candidate it names, if any; and how sure a share of right ones is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.parse import parse_answer

LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z])(?:[.):]|$))\s*")


@dataclass(frozen=True)
class Choice:
    """`index` of the candidate, 0 first, or None and the `reason`."""

    index: int | None
    reason: str | None


def parse_choice(text: str, candidates: Sequence[str]) -> Choice:
    """The candidate that `text` names; nothing is guessed.

    It is named by the content of the one `<answer>...</answer>` outside an open `<think>`, or by the whole text behind
    `</think>` where there is no such tag. The content is a capital letter, alone, in brackets, or followed by a full
    stop, bracket or colon; the candidate itself, word for word, may stand behind it. Reasons are those of
    `parse_answer`, `empty`, `not_a_letter` and `no_such_letter`.

    >>> parse_choice("<think>Soft edges.</think><answer>B</answer>", ["sharp", "blurry"])
    Choice(index=1, reason=None)
    >>> texts = "(A)", "B.", "A. sharp", "A. blurry", "a", "A or B"
    >>> [parse_choice(text, ["sharp", "blurry"]).index for text in texts]
    [0, 1, 0, None, None, None]
    >>> parse_choice("C", ["sharp", "blurry"]).reason
    'no_such_letter'
    """
    reason = parse_answer(text).reason
    tagged = "<answer>" in text or "</answer>" in text
    if reason in ("several_answers", "inside_think") or (reason == "no_answer" and tagged):
        return Choice(None, reason)
    if tagged:
        content = text.partition("<answer>")[2].partition("</answer>")[0]
    elif "<think>" in text and "</think>" not in text:
        return Choice(None, "no_answer")
    else:
        content = text.rpartition("</think>")[2]
    content = content.strip()
    found = LETTER.match(content)
    if not content:
        return Choice(None, "empty")
    if not found:
        return Choice(None, "not_a_letter")
    index, rest = ord(found[1] or found[2]) - ord("A"), content[found.end() :]
    if index >= len(candidates):
        return Choice(None, "no_such_letter")
    return Choice(index, None) if rest in ("", candidates[index]) else Choice(None, "not_a_letter")


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, at 95 % by default; `right` of n >= 1, a tie counting half.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    >>> low, high = wilson(5, 10)
    >>> round(low, 4), round(high, 4)
    (0.2366, 0.7634)
    """
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right: Sequence[float]) -> dict:
    """Share of right answers (each 1, 0 or, for a tie, 0.5), their number and the 95 % interval; None for no answer."""
    if not right:
        return {"accuracy": None, "n": 0, "low": None, "high": None}
    low, high = wilson(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "n": len(right), "low": low, "high": high}
