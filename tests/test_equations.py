"""Equations of docs/algorithm.md and `# Eq. (n)` tags in the code name each other; each tagged line is its equation."""

import ast
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rewards.format import well_formed
from tests.helpers import generator

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
CODE = [path for room in ("grpo", "models", "rewards", "data") for path in (ROOT / room).rglob("*.py")]
CODE += [ROOT / "train.py", ROOT / "evaluate.py"]

TAGS = [
    (int(number), path.relative_to(ROOT).as_posix())
    for path in CODE
    for number in re.findall(r"# Eq\. \((\d+)\)", path.read_text(encoding="utf-8"))
]
ROW = re.compile(r"^\| \((\d+)\) \|.*\| `([\w/.]+)` \| `(.+)` \|$", re.MULTILINE)
TABLE = [(int(number), path) for number, path, _ in ROW.findall(PAGE)]
LINES = {int(number): (ROOT / path, line) for number, path, line in ROW.findall(PAGE)}
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


# ---- each line is its equation

R, K, M = 3, 4, 2  # videos, answers, tokens or opponents
a, b, c = torch.randn(3, R, K, M, generator=generator(0)).unbind()
u, v = torch.rand(2, R, K, M, generator=generator(1)).unbind()
mask = torch.rand(R, K, M, generator=generator(2)) > 0.3
rewards = 3 * u[..., 0]
named = {"ranking": u[..., 0], "regression": v[..., 0]}
won = torch.tensor([True, False, True])
texts = [
    ["<think>a</think><answer>3</answer>", "3"],
    ["<answer>3</answer><think>a</think>", " <think></think> <answer></answer>"],
]


def each(formula, *values):
    """The formula of plain numbers, at each place of tensors that are all of one shape."""
    flat = [formula(*numbers) for numbers in zip(*(value.flatten().tolist() for value in values))]
    return torch.tensor(flat).reshape(values[0].shape)


def softmax(row):
    return [math.exp(x) / sum(map(math.exp, row)) for x in row]


def deviation(row):
    return math.sqrt(sum((x - sum(row) / len(row)) ** 2 for x in row) / (len(row) - 1))


def least(ratio, A, held):
    return ratio * A if ratio * A < held * A else held * A


def normal(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


EQUATIONS = {  # what the line sees, and what the equation says of it
    1: ({"logits": a}, torch.tensor([[[math.log(p) for p in softmax(row)] for row in rows] for rows in a.tolist()])),
    2: (
        {"advantages": a[..., 0], "rewards": rewards, "STD_FLOOR": 1e-4},
        torch.tensor(
            [[x / (deviation(r) + 1e-4) for x in row] for row, r in zip(a[..., 0].tolist(), rewards.tolist())]
        ),
    ),
    3: (
        {"logprobs": a, "old_logprobs": b, "mask": mask},
        each(lambda p, q, m: math.exp(p) / math.exp(q) if m else 1.0, a, b, mask),
    ),
    4: ({"ratio": u, "advantages": a, "clipped": v, "torch": torch}, each(least, u, a, v)),
    5: (
        {"log_ratio": a - b},
        each(lambda p, q: math.exp(p) / math.exp(q) - math.log(math.exp(p) / math.exp(q)) - 1, a, b),
    ),
    6: (
        {"weights": u, "objective": a},
        -torch.tensor(sum(w * j for w, j in zip(u.flatten().tolist(), a.flatten().tolist()))),
    ),
    7: ({"answers": SimpleNamespace(texts=texts)}, [[1.0, 0.0], [0.0, 1.0]]),
    8: (
        {"error": a, "self": SimpleNamespace(sigma=0.7), "torch": torch},
        each(lambda x: math.exp(-(x**2) / (2 * 0.7**2)), a),
    ),
    9: (
        {"gap": a, "std": u[:, 0] + 0.1, "torch": torch},
        each(lambda x, s: normal(x / s), a, (u[:, :1] + 0.1).expand_as(a)),
    ),
    10: (
        {"win": u, "g": v.round(), "_EPS": 1e-6},
        each(
            lambda p, g: math.sqrt(p + 1e-6) + math.sqrt(1e-6) if g else math.sqrt(1e-6) + math.sqrt(1 - p + 1e-6),
            u,
            v.round(),
        ),
    ),
    11: (
        {"self": SimpleNamespace(bonus=0.3, thresholds={"ranking": 0.5}), "won": won, "raw": named, "name": "ranking"},
        each(lambda value, above: 0.3 if above and value > 0.5 else 0.0, named["ranking"], won[:, None].expand(R, K)),
    ),
    12: (
        {"self": SimpleNamespace(weights={"ranking": 0.5, "regression": 2}), "terms": named},
        each(lambda x, y: 0.5 * x + 2 * y, *named.values()),
    ),
}


@pytest.mark.parametrize("number", FORMULAS)
def test_the_tagged_line_computes_its_equation(number):
    """The statement that ends in the tag, alone: what stands around it is tested with the function it is in."""
    file, line = LINES[number]
    source = file.read_text(encoding="utf-8")
    (place,) = [k for k, text in enumerate(source.splitlines(), 1) if text.endswith(f"# Eq. ({number})")]
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.Return, ast.Expr))]
    (statement,) = [node for node in statements if node.lineno == node.end_lineno == place]
    value = statement.value
    value = value.elts[0] if isinstance(value, ast.Tuple) else value  # the loss, beside its sums
    value = value.args[0] if isinstance(statement, ast.Expr) else value  # parts.append(...)
    assert ast.get_source_segment(source, value) == line
    seen, said = EQUATIONS[number]
    found = eval(compile(ast.Expression(value), file, "eval"), {"well_formed": well_formed, **seen})
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(said), rtol=1e-5, atol=1e-6)
