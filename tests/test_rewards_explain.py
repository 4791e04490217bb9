"""Formulas with their numbers filled in: read as arithmetic, they give the rewards."""

import math
import random
import re

import pytest
import torch

from rewards import Answers, Opponents, RankingReward, RegressionReward, RewardTable, TemporalReward, parse_rewards
from rewards.explain import explain

SPEC = "ranking=0.5,format,regression=2,temporal"
N, G = 5, 4
VALUES = {"well-formed": "1", "not well-formed": "0", "no opponent": "0", "the clip could not be perturbed": "0"}


def arithmetic(formula):
    """The value of a formula: [a > b] is 1 or 0, and what no formula was filled in for is 0."""
    if formula.startswith("unparsed, "):
        return 0.0
    formula = VALUES.get(formula, formula)
    formula = re.sub(r"\[[^\]]*?([+-]?[\d.]+) > (-?[\d.]+)[^\]]*\]", r"int(\1 > \2)", formula)
    for sign, python in {"×": "*", "−": "-", "²": "**2"}.items():
        formula = formula.replace(sign, python)
    return eval(formula, {"exp": math.exp, "int": int})


def some_texts(rng):
    """Scores with two digits or one, and some answers without."""

    def text():
        score = rng.choice([f"{rng.uniform(1, 5):.2f}", f"{rng.uniform(1, 5):.1f}", "good"])
        return rng.choice(["<think>So.</think>", ""]) + f"<answer>{score}</answer>"

    return [[text() for _ in range(G)] for _ in range(N - 1)] + [["none"] * G]


def step(seed, scope="video"):
    rng = random.Random(seed)
    mos = torch.tensor([rng.choice([2.0, 3.25, 4.5]) for _ in range(N)])
    answers, copies = (Answers.from_texts(some_texts(rng), mos) for _ in range(2))
    table = RewardTable(
        parse_rewards(SPEC),
        regression=RegressionReward(0.7, 0.6),
        ranking=RankingReward(0.1),
        temporal=TemporalReward(0.4, scope, regression_threshold=0.3),
    )
    ok = torch.tensor([True, True, False, True, True])
    return table, (answers, copies, Opponents.from_answers(answers), torch.arange(N), ok, lambda x: x)


@pytest.mark.parametrize("scope", ["video", "batch"])
def test_formulas_are_the_rewards(scope):
    paid = 0
    for seed in range(8):
        table, arguments = step(seed, scope)
        scored = table(*arguments)
        for n, video in enumerate(explain(table, *arguments)):
            assert list(video["terms"]) == list(scored.terms)
            for name, term in video["terms"].items():
                found = [arithmetic(formula) for formula in term["formulas"]]
                assert found == pytest.approx(scored.terms[name][n].tolist(), abs=1e-3), (name, term["formulas"])
                assert term["weight"] == table.weights[name]
            totals = [arithmetic(formula) for formula in video["totals"]]
            assert totals == pytest.approx(scored.total[n].tolist(), abs=3e-3)
            paid += scored.terms["temporal"][n].sum().item()
    assert paid > 0


def test_comparisons_are_those_of_the_definition():
    table, arguments = step(3)
    answers, copies, *_ = arguments
    scores = [[read.score for read in group if read.score is not None] for group in answers.parsed]
    mos = answers.mos.tolist()
    for n, video in enumerate(explain(table, *arguments)):
        others = video["terms"]["ranking"]["opponents"]
        assert [other["video"] for other in others] == [m for m in range(N) if m != n and scores[m]]
        for other in others:
            m = other["video"]
            mean = sum(scores[m]) / len(scores[m])
            spread = math.sqrt(max(0.1, variance(scores[n]) + variance(scores[m])))
            assert (other["mean"], other["std"]) == pytest.approx((mean, spread), abs=1e-5)
            assert other["truth"] == (mos[n] > mos[m]) + (mos[n] == mos[m]) / 2
            for read, win in zip(answers.parsed[n], other["win"]):
                if read.score is None:
                    assert win is None
                else:
                    normal = (1 + math.erf((read.score - mean) / spread / math.sqrt(2))) / 2
                    assert win == pytest.approx(normal, abs=1e-5)
        told = [(answer["text"], answer["score"]) for answer in video["perturbed_answers"]]
        assert told == [(text, read.score) for text, read in zip(copies.texts[n], copies.parsed[n])]
        assert video["scores"]["count"] == len(scores[n]) and (video["scores"]["mean"] is None) == (not scores[n])


def variance(values):
    mean = sum(values) / max(1, len(values))
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)


def test_terms_stand_alone_and_own_rewards_are_named():
    mos = torch.tensor([3.0, 4.0])
    answers = Answers.from_texts([["<answer>3.00</answer>"], ["<answer>1</answer>"]], mos)
    table = RewardTable(parse_rewards("rewards.format:FormatReward=2"))
    arguments = (answers, None, Opponents.from_answers(answers), torch.arange(2), torch.ones(2).bool(), lambda x: x)
    for video in explain(table, *arguments):
        assert video["terms"] == {"rewards.format:FormatReward": {"weight": 2.0, "formulas": ["as its module says"]}}
        assert video["totals"] == ["2 × 0.000"] and video["perturbed_answers"] == []
