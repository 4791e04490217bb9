"""What the rewards of a step were made of: every term of every answer with its formula filled in, as plain numbers.

N videos of this process, G answers per video, M videos of the global step. A number that is not defined is None.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rewards.answers import Answers
from rewards.ranking import Opponents, RankingReward
from rewards.regression import RegressionReward
from rewards.table import RewardTable
from rewards.temporal import TemporalReward

POINTS = 81  # of the drawn bell


@torch.no_grad()
def explain(
    table: RewardTable,
    answers: Answers,
    perturbed: Answers | None,
    opponents: Opponents,
    own: Tensor,
    perturbed_ok: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> list[dict]:
    """For each of N videos, from the arguments of `RewardTable.forward`, what JSON can hold.

    `scores`: `mean`, `variance` and `count` of the group's. `terms`: for each name its `weight`, the `formulas` of the
    G answers with their numbers, and what the functions below add. `totals`: the formulas of the weighted sum.
    `perturbed_answers`: `text`, `score` or the reason for none, `unparsed`, and base `terms` of the copy's answers.
    """
    terms = table(answers, perturbed, opponents, own, perturbed_ok, sum_over_ranks).terms
    worse = table.values(table.base_terms, perturbed, opponents, own) if table.needs_perturbed else {}
    makers = {
        "regression": lambda reward: regression(reward, answers),
        "ranking": lambda reward: ranking(reward, answers, opponents, own),
        "temporal": lambda reward: temporal(reward, terms, worse, perturbed_ok, sum_over_ranks),
        "format": lambda reward: [{"formulas": ["well-formed" if x else "not well-formed" for x in row]}
                                  for row in terms["format"].tolist()],
    }  # fmt: skip
    unknown = [{"formulas": ["as its module says" for _ in group]} for group in answers.texts]
    made = {name: makers[name](table.reward(name)) if name in makers else unknown for name in terms}
    values = {name: value.tolist() for name, value in terms.items()}
    copies = {name: value.tolist() for name, value in worse.items()}
    statistics = zip(*(x.tolist() for x in (answers.mean(), answers.variance(), answers.count())))
    return [
        {
            "scores": {"mean": finite(mean), "variance": variance, "count": count},
            "terms": {
                name: {"weight": table.weights[name], **details[n], "formulas": told(name, details[n], parsed)}
                for name, details in made.items()
            },
            "totals": [
                " + ".join(f"{table.weights[name]:g} × {value[n][g]:.3f}" for name, value in values.items())
                for g in range(len(parsed))
            ],
            "perturbed_answers": [
                {
                    "text": perturbed.texts[n][g],
                    "score": read.score,
                    "unparsed": read.reason,
                    "terms": {name: value[n][g] for name, value in copies.items()},
                }
                for g, read in enumerate(perturbed.parsed[n] if perturbed else [])
            ],
        }
        for n, (parsed, (mean, variance, count)) in enumerate(zip(answers.parsed, statistics))
    ]


def told(name: str, details: Mapping, parsed: list) -> list[str]:
    """The formulas of a term; an answer without a score has the reason in place of those that need one."""
    needs_score = name in ("regression", "ranking", "temporal")
    formulas = zip(details["formulas"], parsed)
    return [f"unparsed, {read.reason}" if needs_score and read.reason else formula for formula, read in formulas]


def regression(reward: RegressionReward, answers: Answers) -> list[dict]:
    """For each video `sigma`, `coarse_factor`, and `curve`: points (score, reward) of the bell around its MOS."""
    factors, found = reward.factor(answers).tolist(), []
    for mos, group, parsed in zip(answers.mos.tolist(), factors, answers.parsed):
        places = torch.linspace(min(1.0, mos), max(5.0, mos), POINTS)
        curve = list(zip(places.tolist(), reward.bell(places - mos).tolist()))
        formulas = [
            f"{factor:g} × exp(−({read.score} − {mos:.4f})² / (2 × {reward.sigma:g}²))"
            for factor, read in zip(group, parsed)
        ]
        constants = {"sigma": reward.sigma, "coarse_factor": reward.coarse_factor}
        found.append({**constants, "curve": curve, "formulas": formulas})
    return found


def ranking(reward: RankingReward, answers: Answers, opponents: Opponents, own: Tensor) -> list[dict]:
    """For each video its `opponents`: `video`, their number in the step, their `mos` and the `mean` of their scores,
    the `std` of the score difference, the `truth`, and for each of the G answers `win` and `fidelity`.
    """
    compared = reward.compare(answers, opponents, own)
    std, truth, win, fidelity, counted = (x.tolist() for x in compared)
    mos, mean = opponents.mos.tolist(), opponents.mean.tolist()
    found = []
    for n, parsed in enumerate(answers.parsed):
        others = [
            {
                "video": m,
                "mos": mos[m],
                "mean": mean[m],
                "std": std[n][m],
                "truth": truth[n][m],
                "win": [finite(row[m]) for row in win[n]],
                "fidelity": [finite(row[m]) for row in fidelity[n]],
            }
            for m in range(len(mos))
            if counted[n][m]
        ]
        sums = [" + ".join(f"{fidelity[n][g][other['video']]:.3f}" for other in others) for g in range(len(parsed))]
        found.append(
            {"opponents": others, "formulas": [f"({x}) / {len(others)}" if x else "no opponent" for x in sums]}
        )
    return found


def temporal(
    reward: TemporalReward,
    terms: Mapping[str, Tensor],
    worse: Mapping[str, Tensor],
    perturbed_ok: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> list[dict]:
    """For each video `bonus`, `scope`, `ok` (the copy differs), and for each of its `bases` the means of the group,
    `raw`, and of the copy's, `perturbed`, the `gain` that decides (in batch scope the sum of all), what it has to
    exceed, `margin`, and the `threshold` of an answer's own value.
    """
    N = len(perturbed_ok)
    gains = {name: reward.gain(terms[name], worse[name], perturbed_ok, sum_over_ranks).expand(N) for name in worse}
    found = []
    for n, ok in enumerate(perturbed_ok.tolist()):
        bases = {
            name: {
                "raw": terms[name][n].mean().item(),
                "perturbed": worse[name][n].mean().item(),
                "gain": gains[name][n].item(),
                "margin": reward.margin,
                "threshold": reward.thresholds[name],
            }
            for name in worse
        }

        def part(name: str, value: float, base: dict) -> str:
            means = f"mean {name} {apart(base['raw'], base['perturbed'])} of the copy"
            won = (
                means if reward.scope == "video" else f"gains in {name}, summed over the step, {base['gain']:+.3f} > 0"
            )
            return f"{reward.bonus:g} × [{won}] × [own {apart(value, base['threshold'])}]"

        own = zip(*(terms[name][n].tolist() for name in bases))
        formulas = [" + ".join(part(*of) for of in zip(bases, values, bases.values())) for values in own]
        formulas = formulas if ok else ["the clip could not be perturbed" for _ in formulas]
        found.append({"bonus": reward.bonus, "scope": reward.scope, "ok": ok, "bases": bases, "formulas": formulas})
    return found


def apart(a: float, b: float) -> str:
    """`a > b` with as many digits, 3 to 6, as it takes to tell them apart.

    >>> apart(0.95, 0.9), apart(0.90004, 0.9)
    ('0.950 > 0.900', '0.90004 > 0.90000')
    """
    texts = ((f"{a:.{digits}f}", f"{b:.{digits}f}") for digits in range(3, 7))
    return " > ".join(next((pair for pair in texts if pair[0] != pair[1]), (f"{a:.6f}", f"{b:.6f}")))


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
