"""Who may import what, so that every room can be read alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"rewards", "data", "models", "grpo"}
FILES = [path.relative_to(ROOT).as_posix() for room in sorted(ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]
FILES += ["train.py", "evaluate.py"]

# What wires rooms together, and the other rooms that it may enter. Nothing imports these, but that train.py takes the
# measurements of evaluate.py, both take models/scorer.py, which package users import too, and evaluate.py's tasks are
# models/understanding.py, which takes it as well.
SCRIPTS = {
    "train.py": ROOMS,
    "evaluate.py": ROOMS,
    "models/scorer.py": {"data", "rewards"},
    "models/tiny/pretrain.py": {"data"},
    "models/understanding.py": {"data", "grpo", "rewards"},
}
THIRD_PARTY = {"torch", "transformers", "torchvision", "av", "numpy", "scipy", "tqdm"}
# What torch or transformers itself requires and brings along, and where it is needed by name.
BROUGHT = {
    "grpo/page.py": {"jinja2"},
    "models/tiny/pretrain.py": {"tokenizers"},
    "models/checkpoints.py": {"safetensors"},
    "models/loading.py": {"safetensors"},
    "models/lora.py": {"safetensors"},
    "models/slowfast.py": {"safetensors"},
    "data/frame_cache.py": {"safetensors"},
}

EXTRAS = {"models/lora.py": {"peft"}}  # what setup.py's extras install, and where; imported inside functions


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
    forbidden |= {"train", "models.tiny.pretrain"} | ({"evaluate"} if name != "train.py" else set())
    forbidden |= {"models.scorer"} if name not in ("train.py", "evaluate.py", "models/understanding.py") else set()
    forbidden |= {"models.understanding"} if name != "evaluate.py" else set()
    if name != "grpo/distributed.py":
        forbidden |= {"torch.distributed", "torch.nn.parallel"}
    assert [i for i in imports(name) if any(f"{i}.".startswith(f"{package}.") for package in forbidden)] == []


@pytest.mark.parametrize("name", FILES)
def test_third_party_imports_are_the_ones_that_setup_installs(name):
    known = sys.stdlib_module_names | THIRD_PARTY | BROUGHT.get(name, set()) | ROOMS | {"evaluate"}
    known |= EXTRAS.get(name, set())
    assert {imported.split(".")[0] for imported in imports(name)} <= known


@pytest.mark.parametrize("name", EXTRAS)
def test_extras_are_imported_when_they_are_asked_for(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in at_once for alias in node.names]
    names += [node.module for node in at_once if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & EXTRAS[name]
    assert {imported.split(".")[0] for imported in imports(name)} >= EXTRAS[name]


def test_imports_are_seen():
    assert {imported.split(".")[0] for imported in imports("train.py")} >= ROOMS
