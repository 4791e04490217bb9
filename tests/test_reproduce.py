"""docs/reproduce.md: every value that changes results stands there, as it is in the code, with where it is from."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
from grpo.config import OURS, RELEASED, SCRIPT, Config, option, parse_config
from grpo.master_weights import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
FLAGS = re.findall(r"^\| `--([\w-]+)` \| (.*?) \| (.*?) \| (.+) \|$", PAGE, re.MULTILINE)
VALUES = re.findall(r"^\| `([a-z]+\.[^`]+)`.*? \| (.*?) \| (.+) \|$", PAGE, re.MULTILINE)
PLACES = ("model", "slowfast", "labels", "videos")  # files, not values


def test_every_flag_that_changes_results_is_there_with_its_values():
    demo = parse_config([])
    preset = parse_config(["--preset", "internvl3-8b", "--labels", "l", "--videos", "v"])
    assert {name: (here, there) for name, here, there, _ in FLAGS} == {
        option(field.name)[2:]: (str(getattr(demo, field.name)), str(getattr(preset, field.name)))
        for field in dataclasses.fields(Config)
        if field.metadata["changes"] == "results" and field.name not in PLACES
    }
    assert len(FLAGS) == len({name for name, *_ in FLAGS})


def test_sources_are_those_of_the_presets():
    for name, _, _, source in FLAGS:
        value, said = RELEASED.get(name.replace("-", "_"), (None, ""))
        assert source.startswith("script") or not said.startswith(SCRIPT), name
        assert source.startswith("ours") or said != OURS, name
        if said.startswith(SCRIPT):
            assert str(value) == next(there for flag, _, there, _ in FLAGS if flag == name)


@pytest.mark.parametrize(("name", "value", "source"), VALUES)
def test_what_stands_in_no_flag_has_the_value_that_is_told(name, value, source):
    module = re.match(r"(torch\.optim|\w+\.\w+)\.", name)[1]
    found = eval(name.removeprefix(f"{module}."), {**vars(importlib.import_module(module)), "torch": torch})
    assert str(found) == value and source


def test_the_optimizer_of_a_run_has_these_values():
    used = MasterAdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
    told = {re.search(r'\["(\w+)"\]', name)[1]: value for name, value, _ in VALUES if "AdamW" in name}
    assert told == {"betas": str(used["betas"]), "eps": str(used["eps"])} and len(VALUES) == 11


COMMANDS = [
    line
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for line in re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines()
    if line.endswith("# needs-gpu") and re.search(r" (train|evaluate)\.py ", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_needs_gpus_has_flags_that_there_are(command):
    """It is not run, but it is parsed: wrong flags, and flags that do not go together, end here."""
    words = shlex.split(command, comments=True)
    (script,) = {"train.py", "evaluate.py"} & set(words)
    arguments = words[words.index(script) + 1 :]
    (parse_config if script == "train.py" else evaluate.parse_arguments)(arguments)
