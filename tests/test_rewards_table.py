import itertools
import random
import sys
import types

import pytest
import torch
from torch import nn

from rewards import (
    Answers,
    FormatReward,
    Opponents,
    RankingReward,
    RegressionReward,
    RewardTable,
    TemporalReward,
    parse_rewards,
)

NAMES = ("regression", "ranking", "temporal", "format")
SELECTIONS = [
    order
    for size in range(1, 5)
    for order in itertools.permutations(NAMES, size)
    if "temporal" not in order or {"ranking", "regression"} & set(order)
]


class Length(nn.Module):
    def forward(self, answers):
        return torch.tensor([[len(text) for text in group] for group in answers.texts])


class Custom(nn.Module):
    result = None

    def forward(self, answers):
        return self.result


class Picky(nn.Module):
    def __init__(self, argument):
        super().__init__()


@pytest.fixture(autouse=True)
def user_module(monkeypatch):
    module = types.ModuleType("user.code")
    module.Length, module.Custom, module.Picky, module.function = Length, Custom, Picky, lambda: 1
    monkeypatch.setitem(sys.modules, "user", types.ModuleType("user"))
    monkeypatch.setitem(sys.modules, "user.code", module)


def completion(rng):
    score = f"{rng.uniform(0.5, 5):.{rng.randrange(3)}f}"
    return rng.choice(["<think>t</think><answer>{}</answer>"] * 3 + ["<answer>{}</answer>", "{}"]).format(score)


def inputs(videos=5, answers=4, seed=0):
    rng = random.Random(seed)
    mos = torch.tensor([rng.uniform(1, 5) for _ in range(videos)])
    raw, perturbed = (
        Answers.from_texts([[completion(rng) for _ in range(answers)] for _ in range(videos)], mos) for _ in range(2)
    )
    ok = torch.ones(videos, dtype=torch.bool)
    ok[0] = False
    return {
        "answers": raw,
        "perturbed": perturbed,
        "opponents": Opponents.from_answers(raw),
        "own": torch.arange(videos),
        "perturbed_ok": ok,
    }


def score(spec, given):
    return RewardTable(parse_rewards(spec))(**given)


def test_terms_equal_their_modules():
    given = inputs()
    raw, perturbed, opponents, own, ok = given.values()
    terms = score("regression,ranking,temporal,format", given).terms
    ranking, regression = RankingReward(), RegressionReward()
    base = {"ranking": ranking(raw, opponents, own), "regression": regression(raw)}
    worse = {"ranking": ranking(perturbed, opponents, own), "regression": regression(perturbed)}
    expected = base | {"format": FormatReward()(raw), "temporal": TemporalReward()(base, worse, ok)}
    assert terms.keys() == expected.keys()
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    assert terms["temporal"].any()


def test_values_depend_on_neither_order_nor_selection():
    given = inputs()
    alone = {name: score(name, given).terms[name] for name in NAMES if name != "temporal"}
    bonus = {name: score(f"{name},temporal", given).terms["temporal"] for name in ("ranking", "regression")}
    totals = {}
    for order in SELECTIONS:
        spec = ",".join(f"{name}={0.3 * (1 + NAMES.index(name))}" for name in order)
        terms, total = score(spec, given)
        assert tuple(terms) == order
        for name, value in terms.items():
            expected = sum(bonus[base] for base in bonus if base in order) if name == "temporal" else alone[name]
            assert torch.equal(value, expected)
        by_hand = sum(0.3 * (1 + NAMES.index(name)) * terms[name] for name in terms)
        torch.testing.assert_close(total, by_hand)
        assert torch.equal(totals.setdefault(frozenset(order), total), total)


def test_inputs_are_not_changed():
    given = inputs()
    before = inputs()
    score("regression,ranking,temporal,format,user.code:Length", given)
    for name in ("answers", "perturbed"):
        for field in ("scores", "valid", "decimals", "mos"):
            torch.testing.assert_close(
                getattr(given[name], field), getattr(before[name], field), equal_nan=True, rtol=0, atol=0
            )
        assert (given[name].texts, given[name].parsed) == (before[name].texts, before[name].parsed)
    for field in Opponents._fields:
        torch.testing.assert_close(
            getattr(given["opponents"], field), getattr(before["opponents"], field), equal_nan=True
        )
    assert torch.equal(given["own"], before["own"]) and torch.equal(given["perturbed_ok"], before["perturbed_ok"])


@pytest.mark.parametrize("text", ["", "<answer>3.00</answer>", "<think></think><answer>nan</answer>"])
@pytest.mark.parametrize(("videos", "answers"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_degenerate_groups_are_finite(text, videos, answers):
    batch = Answers.from_texts([[text] * answers] * videos, torch.full((videos,), 3.0))
    opponents, own, ok = Opponents.from_answers(batch), torch.arange(videos), torch.ones(videos, dtype=torch.bool)
    terms, total = RewardTable(parse_rewards("regression,ranking,temporal,format"))(batch, batch, opponents, own, ok)
    assert all(value.isfinite().all() and value.shape == (videos, answers) for value in (*terms.values(), total))


def test_unparsed_answers_earn_nothing_for_their_score():
    given = inputs(seed=1)
    terms = score("regression,ranking,temporal", given).terms
    unparsed = ~given["answers"].valid
    assert unparsed.any() and not any(value[unparsed].any() for value in terms.values())


def test_weight_zero_is_measured_but_does_not_count():
    given = inputs()
    terms, total = score("regression=0,format=2", given)
    assert terms["regression"].any() and torch.equal(total, 2 * terms["format"])


def test_needs():
    def needs(spec):
        table = RewardTable(parse_rewards(spec))
        return table.needs_opponents, table.needs_perturbed

    assert needs("format,regression") == (False, False)
    assert needs("ranking=0,format") == (True, False)
    assert needs("temporal,regression") == (False, True)


def test_unneeded_inputs_may_be_left_out():
    given = inputs()
    assert set(score("regression,format", {"answers": given["answers"]}).terms) == {"regression", "format"}


def test_configured_rewards_replace_the_defaults():
    given = inputs()
    table = RewardTable(
        parse_rewards("regression,ranking,temporal"),
        regression=RegressionReward(sigma=2.0),
        ranking=RankingReward(variance_floor=99.0),
        temporal=TemporalReward(bonus=7.0),
    )
    terms = table(**given).terms
    assert torch.equal(terms["regression"], RegressionReward(2.0)(given["answers"]))
    assert torch.equal(terms["ranking"], RankingReward(99.0)(given["answers"], given["opponents"], given["own"]))
    assert terms["temporal"].max() >= 7


def test_batch_scope_reaches_the_other_ranks():
    sent = []
    table = RewardTable(parse_rewards("regression,ranking,temporal"), temporal=TemporalReward(scope="batch"))
    table(**inputs(), sum_over_ranks=lambda tensor: sent.append(tensor) or tensor)
    assert [tensor.shape for tensor in sent] == [(), ()]


def test_own_reward_by_module_and_class():
    given = inputs()
    terms, total = score("format,user.code:Length=0.5", given)
    length = torch.tensor([[float(len(text)) for text in group] for group in given["answers"].texts])
    assert torch.equal(terms["user.code:Length"], length) and terms["user.code:Length"].dtype == torch.float32
    torch.testing.assert_close(total, terms["format"] + 0.5 * length)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "shape .* got NoneType"),
        (torch.zeros(5), r"shape .*\(5, 4\), got \(5,\)"),
        (torch.full((5, 4), torch.nan), "NaN or infinity"),
        (torch.full((5, 4), torch.inf), "NaN or infinity"),
        (torch.full((5, 4), 1e300, dtype=torch.float64), "NaN or infinity"),
    ],
)
def test_own_reward_must_return_finite_values_of_the_right_shape(monkeypatch, result, message):
    monkeypatch.setattr(Custom, "result", result)
    with pytest.raises(ValueError, match=f"--rewards 'user.code:Custom': .*{message}"):
        score("user.code:Custom", inputs())


@pytest.mark.parametrize(
    "name",
    ["no_such_module:A", "user.code:Absent", "user.code:Picky", "user.code:function", ":A", "user.code:", ".a:B"],
)
def test_own_reward_that_cannot_be_built(name):
    with pytest.raises(ValueError, match=f"--rewards '{name}'"):
        RewardTable(parse_rewards(name))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("format", {"format": 1.0}),
        (" ranking = 0.5 , regression ", {"ranking": 0.5, "regression": 1.0}),
        ("a.b:C=1e-3,format=0", {"a.b:C": 0.001, "format": 0.0}),
    ],
)
def test_parse_rewards(spec, expected):
    weights = parse_rewards(spec)
    assert weights == expected and list(weights) == list(expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no name"),
        ("format,", "no name"),
        ("format,,ranking", "no name"),
        ("=1", "no name"),
        ("rankin", "unknown reward 'rankin'; did you mean 'ranking'"),
        ("beauty", "unknown reward 'beauty'; choose from regression, ranking, temporal, format"),
        ("format,ranking,format=2", "'format' is named twice"),
        ("format=", "'format=': the weight"),
        ("format=x", "'format=x': the weight"),
        ("format=1=2", "'format=1=2': the weight"),
        ("format=nan", "'format=nan': the weight"),
        ("format=inf", "'format=inf': the weight"),
        ("ranking, format=-1", "'format=-1': the weight"),
        ("format=0,ranking=0", "at least one weight"),
        ("temporal", "'temporal' needs 'ranking' or 'regression'"),
        ("temporal,format", "'temporal' needs 'ranking' or 'regression'"),
    ],
)
def test_parse_rewards_names_the_fault(spec, message):
    with pytest.raises(ValueError, match="--rewards") as error:
        parse_rewards(spec)
    assert message in str(error.value)
