"""Who may import what, so that every room can be read alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"rewards", "data", "models", "grpo"}
FILES = [path.relative_to(ROOT).as_posix() for room in sorted(ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]
FILES += ["train.py", "evaluate.py"]

# Scripts that wire rooms together, and the other rooms that they may enter. Nothing imports them, but for evaluate.py,
# whose measurements train.py takes, and what evaluate.py itself is made of.
SCRIPTS = {
    "train.py": ROOMS,
    "evaluate.py": ROOMS,
    "models/tiny/pretrain.py": {"data"},
    "models/understanding.py": {"data", "grpo", "rewards"},  # evaluate.py's tasks
}
THIRD_PARTY = {"torch", "transformers", "torchvision", "av", "numpy", "scipy", "tqdm"}
# What transformers itself requires and brings along, and where it is needed by name.
BROUGHT = {
    "models/tiny/pretrain.py": {"tokenizers"},
    "models/checkpoints.py": {"safetensors"},
    "models/loading.py": {"safetensors"},
    "models/slowfast.py": {"safetensors"},
    "data/frame_cache.py": {"safetensors"},
}


def imports(name):
    """Full dotted names of all that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_rooms_keep_to_themselves(name):
    forbidden = ROOMS - {name.split("/")[0]} - SCRIPTS.get(name, set())
    forbidden |= (
        {"train", "models.tiny.pretrain"}
        | ({"models.understanding"} if name != "evaluate.py" else set())
        | ({"evaluate"} if name != "train.py" else set())
    )
    if name != "grpo/distributed.py":
        forbidden |= {"torch.distributed", "torch.nn.parallel"}
    assert [i for i in imports(name) if any(f"{i}.".startswith(f"{package}.") for package in forbidden)] == []


@pytest.mark.parametrize("name", FILES)
def test_third_party_imports_are_the_ones_that_setup_installs(name):
    known = sys.stdlib_module_names | THIRD_PARTY | BROUGHT.get(name, set()) | ROOMS | {"evaluate"}
    assert {imported.split(".")[0] for imported in imports(name)} <= known


def test_imports_are_seen():
    assert {imported.split(".")[0] for imported in imports("train.py")} >= ROOMS
