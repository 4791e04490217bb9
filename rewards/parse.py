"""Model text to a score, or the reason why there is none. Training and evaluation both read answers here."""

import re
from dataclasses import dataclass

REASONS = ("no_answer", "several_answers", "inside_think", "empty", "not_a_number", "out_of_range")
_NUMBER = re.compile(r"[0-9]+(?:\.([0-9]+))?")  # \d would admit digits of every alphabet


@dataclass(frozen=True)
class Parsed:
    """One answer as read. `reason` is one of `REASONS` where `score` and `decimals` are None, else None."""

    score: float | None
    decimals: int | None  # digits written after the point: "3.50" has 2, "3" has 0
    reason: str | None
    reasoning: str  # the first <think>...</think>, stripped; "" if there is none


def parse_answer(text: str) -> Parsed:
    """Read the score out of `text`; nothing is guessed and nothing is repaired.

    A score is the stripped content of exactly one `<answer>...</answer>`, outside any open `<think>`: ASCII digits,
    optionally a point and more digits, in [1, 5]. A missing `<think>` block does not cost the score, since
    structure is what `FormatReward` pays for. Tags are case-sensitive. Takes time linear in the text. Never raises.

    >>> parse_answer("<think>Mild blur.</think><answer>3.50</answer>")
    Parsed(score=3.5, decimals=2, reason=None, reasoning='Mild blur.')
    >>> parse_answer("I say <answer> 4 </answer>")
    Parsed(score=4.0, decimals=0, reason=None, reasoning='')
    >>> {parse_answer(f"<answer>{content}</answer>").reason for content in ("4,5", "nan", "1e400", "-2", "4.", "４")}
    {'not_a_number'}
    >>> parse_answer("<answer>45</answer>").reason, parse_answer("<answer> </answer>").reason
    ('out_of_range', 'empty')
    >>> parse_answer("4.20").reason, parse_answer("<answer>4.20").reason
    ('no_answer', 'no_answer')
    >>> parse_answer("<answer>4</answer><answer>4</answer>").reason
    'several_answers'
    >>> parse_answer("<think>Perhaps <answer>4</answer>?</think>").reason
    'inside_think'
    """
    thought, thought_closed, _ = text.partition("<think>")[2].partition("</think>")
    before, _, after = text.partition("<answer>")
    content, answer_closed, _ = after.partition("</answer>")
    number = _NUMBER.fullmatch(content.strip())
    reasoning = thought.strip() if thought_closed else ""

    if text.count("<answer>") > 1 or text.count("</answer>") > 1:
        reason = "several_answers"
    elif not answer_closed:
        reason = "no_answer"
    elif before.rfind("<think>") > before.rfind("</think>"):
        reason = "inside_think"
    elif not content.strip():
        reason = "empty"
    elif number is None:
        reason = "not_a_number"
    elif not 1 <= float(number[0]) <= 5:
        reason = "out_of_range"
    else:
        return Parsed(float(number[0]), len(number[1] or ""), None, reasoning)
    return Parsed(None, None, reason, reasoning)
