"""The documentation is true: its commands run, its links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").rglob("*.md")])
# Added to the commands of the documentation so that a test of all of them takes seconds; later flags win.
QUICK = {
    "train.py": "--steps 2 --videos-per-step 4 --group-size 2 --workers 0 --eval-every 1",
    "grpo.ablate": "--rows temporal --temporal-scope batch --seeds 0 --steps 1 --videos-per-step 2 --workers 0",
    "tests.benchmarks.released_faults": "--seeds 0 --table",
    "tests.benchmarks.bootstrap": "--videos 50 --resamples 20",
    "tests.benchmarks.decode": "--seconds 1 --size 64 48 --rounds 1 --steps 3",
    "tests.benchmarks.motion": "--seeds 0 --fresh 12 --steps 1 --videos-per-step 2 --workers 0",
    "tests.benchmarks.slowfast": "--rounds 1",
    "tests.benchmarks.step_time": "--model tiny --group 2 --new-tokens 3 --rounds 1",
    "tests.benchmarks.attention": "--group 2 --new-tokens 3 --rounds 1",
    "tests.benchmarks.score": "--videos 3 --rounds 1",
    "tests.benchmarks.soak": "--steps 4 --save-every 2 --kills 0 --group-size 2 --max-new-tokens 3",
    "data.understanding": "--split val",
    "describe": "--split val",
    "compare": "--pairs 2",
    "data.synthetic": "--train 2 --val 1 --test 1",
    "models.tiny.pretrain": "--clips 4 --vision-steps 1 --motion-steps 1 --caption-steps 1",
}

NEEDS = {"lora": "peft", "--tensorboard": "tensorboard"}  # what is in a command: the package that it is for


def commands(page: Path) -> list[str]:
    """The command lines of a page's ```bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


def python_blocks(page: Path) -> dict[str, str]:
    """The page's ```python blocks, by the name of the file that the first line gives, or by a number."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = [re.match(r"# (\w+\.py)\n", block) for block in blocks]
    return {name[1] if name else str(k): block for k, (name, block) in enumerate(zip(names, blocks))}


def quick(words: list[str]) -> list[str]:
    """The words of a command, in this Python, with the flags that make it short."""
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = programs.get(words[0], words[:1]) + words[1:]
    if "--dry-run" in words:  # quick as it is
        return words
    return words + next((shlex.split(flags) for name, flags in QUICK.items() if name in words), [])


def keep_every_eighth(labels: Path) -> None:
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[::8]))


def test_every_command_of_every_page_runs_in_order(tmp_path):
    """As a new user types them, in a folder that holds the project and nothing else.

    The first command makes the demo's clips and takes all of them, the others an eighth. The first of each script, and
    of modules, is a process of its own, as torchrun's are; the others are forks.
    """
    for name in ("grpo", "models", "rewards", "data", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    snippets = python_blocks(ROOT / "README.md")
    for name in [name for name in snippets if name.endswith(".py")]:
        (tmp_path / name).write_text(snippets.pop(name))
    begun = []
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line, comments=True)
            if "needs-gpu" in line or words[0] == "make":
                continue
            absent = [package for word, package in NEEDS.items() if word in line and find_spec(package) is None]
            if absent and "--dry-run" not in line:
                warnings.warn(f"left out, for want of {absent[0]}: {line}", stacklevel=1)
                continue
            if words[0] == "python" and words[1] in begun:
                done = forks.run(quick(words), tmp_path, environment)
            else:
                done = subprocess.run(quick(words), cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
            if not begun:
                keep_every_eighth(tmp_path / "clips/demo/labels.jsonl")
            begun.append(words[1])
    assert len(begun) >= 8
    for code in snippets.values():  # they use what the commands have made
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert len(snippets) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_named_in_the_pages_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line


def test_make_demo_runs_the_command_that_the_readme_shows():
    dry = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    shown = next(line for line in commands(ROOT / "README.md") if line.startswith("torchrun"))
    assert shown in dry


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
