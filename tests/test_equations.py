"""Equations of docs/algorithm.md and `# Eq. (n)` tags in the code name each other, both ways."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
CODE = [path for room in ("grpo", "models", "rewards", "data") for path in (ROOT / room).rglob("*.py")]
CODE += [ROOT / "train.py", ROOT / "evaluate.py"]

TAGS = [
    (int(number), path.relative_to(ROOT).as_posix())
    for path in CODE
    for number in re.findall(r"# Eq\. \((\d+)\)", path.read_text(encoding="utf-8"))
]
ROW = re.compile(r"^\| \((\d+)\) \|.*\| `([\w/.]+)` \|$", re.MULTILINE)
TABLE = [(int(number), path) for number, path in ROW.findall(PAGE)]
FORMULAS = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", PAGE)]


def test_every_tag_is_in_the_table_with_its_file_and_every_row_has_one_tag():
    assert sorted(TAGS) == sorted(TABLE)


def test_equations_are_numbered_once_from_one_in_reading_order():
    assert FORMULAS == [number for number, _ in TABLE] == list(range(1, len(FORMULAS) + 1))
    assert max(Counter(number for number, _ in TAGS).values()) == 1


def test_equations_that_other_pages_and_help_texts_cite_exist():
    cited = set()
    for path in [*CODE, *(ROOT / "docs").rglob("*.md")]:
        cited |= {int(number) for number in re.findall(r"Eq\. \(?(\d+)", path.read_text(encoding="utf-8"))}
    assert cited <= set(FORMULAS)
