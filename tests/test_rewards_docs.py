"""The examples in docstrings and in docs/rewards.md run, and the page names what the code has."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

from rewards import REASONS, Answers, RewardTable, parse_rewards

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["parse", "answers", "format", "table", "explain"])
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(f"rewards.{module}"))
    assert result.attempted and not result.failed


def test_own_reward_of_the_page(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n# my_rewards\.py\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    thoughts = ["one two three four five", "one two", "word " * 61]
    answers = Answers.from_texts([[f"<think>{thought}</think>" for thought in thoughts]], torch.tensor([3.0]))
    terms, total = RewardTable(parse_rewards("my_rewards:Concise=0.5"))(answers)
    assert terms["my_rewards:Concise"].tolist() == [[1, 0, 0]] and total.tolist() == [[0.5, 0, 0]]


def test_command_lines_of_the_page_parse():
    specs = re.findall(r"^ +--rewards (.*)$", PAGE, re.MULTILINE)
    assert len(specs) == 4 and all(map(parse_rewards, specs))


def test_page_lists_every_reason():
    assert tuple(re.findall(r"^\| `(\w+_\w+|empty)` \|", PAGE, re.MULTILINE)) == REASONS
