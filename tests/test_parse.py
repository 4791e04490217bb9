import time

import pytest

from rewards import REASONS, parse_answer


def tagged(content):
    return f"<think>t</think><answer>{content}</answer>"


@pytest.mark.parametrize(
    ("content", "score", "decimals"),
    [("3.50", 3.5, 2), ("4", 4.0, 0), ("4.0", 4.0, 1), ("1", 1.0, 0), ("5.00", 5.0, 2), ("\n 2.125\t", 2.125, 3)],
)
def test_reads_plain_decimals(content, score, decimals):
    parsed = parse_answer(tagged(content))
    assert (parsed.score, parsed.decimals, parsed.reason, parsed.reasoning) == (score, decimals, None, "t")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_answer"),
        ("3.50", "no_answer"),
        ("Frame1 is blurry", "no_answer"),
        ("<answer>3.50", "no_answer"),
        ("3.50</answer>", "no_answer"),
        ("</answer>3.50<answer>", "no_answer"),
        ("<ANSWER>3.50</ANSWER>", "no_answer"),
        ("<answer>3</answer><answer>3</answer>", "several_answers"),
        ("<answer>3</answer></answer>", "several_answers"),
        ("<answer><answer>3</answer>", "several_answers"),
        (tagged("<answer>3</answer>"), "several_answers"),
        ("<think><answer>3</answer></think>", "inside_think"),
        ("<think>a</think><think><answer>3</answer></think>", "inside_think"),
        ("<think>never closed <answer>3</answer>", "inside_think"),
        (tagged(""), "empty"),
        (tagged(" \n"), "empty"),
        (tagged("<think>3</think>"), "not_a_number"),
        *((tagged(number), "not_a_number") for number in ("4,5", "nan", "inf", "1e400", "3e0", "-2", "+2", "4.", ".5")),
        *(
            (tagged(number), "not_a_number")
            for number in ("３", "٣", "²", "3/5", "3 4", "3.5.0", "1_0", "0x3", "3.5 stars")
        ),
        *((tagged(number), "out_of_range") for number in ("45", "0", "0.99", "5.01", "9" * 400)),
    ],
)
def test_refuses_everything_else(text, reason):
    parsed = parse_answer(text)
    assert (parsed.score, parsed.decimals, parsed.reason) == (None, None, reason)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think> a\nb </think><answer>3</answer>", "a\nb"),
        ("<think>a</think><think>b</think>", "a"),
        ("<think>cut off", ""),
        ("a</think>", ""),
        ("<answer>3</answer>", ""),
    ],
)
def test_reasoning_is_the_first_thought(text, reasoning):
    assert parse_answer(text).reasoning == reasoning


def test_a_missing_thought_does_not_cost_the_score():
    assert parse_answer("I say <answer>3.1</answer>, or 4.").score == 3.1


MILLION = 10**6


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * (MILLION // 7),
        "<answer>" * (MILLION // 8),
        "<think></think>" * (MILLION // 15),
        "<" * MILLION,
        tagged(" " * MILLION + "x"),
        tagged("4" * MILLION),
        tagged("4." + "1" * MILLION + "x"),
        tagged("4" * (MILLION // 2) + "." + "4" * (MILLION // 2)),
        "<think>" + " " * MILLION + "<answer>3</answer>",
    ],
    ids=range(9),
)
def test_time_is_linear_in_the_text(text):
    start = time.perf_counter()
    assert parse_answer(text).score is None
    assert time.perf_counter() - start < 1  # milliseconds when linear, hours when quadratic
