"""Who may import what, so that every room can be read alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("rewards", "data", "models", "grpo")
ENTRY_SCRIPTS = ("train.py", "evaluate.py", "models/tiny/pretrain.py")  # nothing imports them; they may wire rooms
FILES = [path.relative_to(ROOT).as_posix() for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
FILES += ["train.py", "evaluate.py"]
THIRD_PARTY = {"torch", "transformers", "torchvision", "av", "numpy", "scipy", "tqdm"}


def imports(name):
    """Full dotted names of all that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(imported, package):
    return f"{imported}.".startswith(f"{package}.")


@pytest.mark.parametrize("name", FILES)
def test_rooms_keep_to_themselves(name):
    others = set(ROOMS) - {name.split("/")[0]} if name not in ENTRY_SCRIPTS else set()
    forbidden = others | {"train", "models.tiny.pretrain"} | ({"evaluate"} if name != "train.py" else set())
    if name != "grpo/distributed.py":
        forbidden |= {"torch.distributed", "torch.nn.parallel"}
    assert [i for i in imports(name) if any(within(i, package) for package in forbidden)] == []


@pytest.mark.parametrize("name", FILES)
def test_third_party_imports_are_the_ones_that_setup_installs(name):
    # transformers itself requires tokenizers.
    allowed = THIRD_PARTY | ({"tokenizers"} if name == "models/tiny/pretrain.py" else set())
    known = sys.stdlib_module_names | allowed | {*ROOMS, "evaluate"}
    assert {imported.split(".")[0] for imported in imports(name)} <= known


def test_rewards_see_no_models_and_models_no_rewards():
    """The rules above bite: the wiring scripts do import across rooms."""
    crossing = {imported.split(".")[0] for imported in imports("train.py")}
    assert crossing >= set(ROOMS)
