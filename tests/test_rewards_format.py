import time

import pytest
import torch

from rewards import Answers, FormatReward

WELL_FORMED = [
    "<think>a</think><answer>3.50</answer>",
    "\n<think>a\nb</think> \n\t<answer>3.50</answer>  ",
    "<think></think><answer></answer>",
    "<think>a < b</think><answer>no number</answer>",
]
MALFORMED = [
    "",
    "3.50",
    "<answer>3</answer>",
    "<think>a</think>",
    "<answer>3</answer><think>a</think>",
    "<think>a</think> so <answer>3</answer>",
    "so <think>a</think><answer>3</answer>",
    "<think>a</think><answer>3</answer>.",
    "<think>a<answer>3</answer></think>",
    "<think>a</think><answer>3</answer><answer>3</answer>",
    "<think><think>a</think><answer>3</answer>",
    "<think>a</think></think><answer>3</answer>",
    "<think>a</think><answer>3</think></answer>",
    "<think>a</think><answer><answer>3</answer>",
    "<think>a</think><answer>3</answer></answer>",
    "<THINK>a</THINK><ANSWER>3</ANSWER>",
]


@pytest.mark.parametrize(
    ("text", "expected"), [*((text, 1.0) for text in WELL_FORMED), *((text, 0.0) for text in MALFORMED)]
)
def test_each_tag_once_and_nothing_outside(text, expected):
    assert FormatReward()(Answers.from_texts([[text]], torch.tensor([3.0]))).item() == expected


def test_shape_is_videos_by_answers():
    batch = Answers.from_texts([[WELL_FORMED[0], "", ""], ["", "", WELL_FORMED[1]]], torch.tensor([3.0, 4.0]))
    assert FormatReward()(batch).tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("piece", ["<think>", "</think>", " ", "<think></think> "])
def test_time_is_linear_in_the_text(piece):
    text = "<think>" + piece * (10**6 // len(piece)) + "</think><answer>3</answer>x"
    batch = Answers.from_texts([[text]], torch.tensor([3.0]))
    start = time.perf_counter()
    assert FormatReward()(batch).item() == 0
    assert time.perf_counter() - start < 1
