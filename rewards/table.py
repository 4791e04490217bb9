"""The named, weighted sum of rewards that `--rewards` describes.

N videos of this process, G answers per video, M videos of the global step.
"""

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewards.answers import Answers
from rewards.format import FormatReward
from rewards.ranking import Opponents, RankingReward
from rewards.regression import RegressionReward
from rewards.temporal import BASE_TERMS, TemporalReward

BUILT_IN = ("regression", "ranking", "temporal", "format")


def parse_rewards(spec: str) -> dict[str, float]:
    """Read `name[=weight],...` into weights by name, in the order given. Strings only: nothing is imported or built.

    A name is one of `BUILT_IN` or `module:Class`. The weight defaults to 1; 0 measures and logs a reward that does
    not count.

    Raises ValueError naming `--rewards` and the piece at fault.

    >>> parse_rewards("regression, ranking=0.5, my_module:MyReward=0")
    {'regression': 1.0, 'ranking': 0.5, 'my_module:MyReward': 0.0}
    """
    weights: dict[str, float] = {}
    for piece in spec.split(","):
        name, given, weight = (part.strip() for part in piece.partition("="))
        if not name:
            raise ValueError(f"--rewards {spec!r}: a reward has no name; write e.g. regression,ranking=0.5")
        if ":" not in name and name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(BUILT_IN)} or write module:Class"
            raise ValueError(f"--rewards: unknown reward {name!r}; {hint}")
        if name in weights:
            raise ValueError(f"--rewards: {name!r} is named twice")
        weights[name] = _weight(piece.strip(), weight) if given else 1.0
    if "temporal" in weights and weights.keys().isdisjoint(BASE_TERMS):
        raise ValueError(f"--rewards {spec!r}: 'temporal' needs {' or '.join(map(repr, BASE_TERMS))} beside it")
    if not any(weights.values()):
        raise ValueError(f"--rewards {spec!r}: at least one weight must be above 0")
    return weights


def _weight(piece: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"--rewards {piece!r}: the weight must be a finite number, at least 0")
    return weight


def _load(name: str) -> nn.Module:
    """Build the user's reward `module:Class`."""
    module, _, attribute = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--rewards {name!r}: cannot import and build it without arguments: {error}") from error
    if not isinstance(reward, nn.Module):
        raise ValueError(f"--rewards {name!r}: must be a torch.nn.Module, got {type(reward).__name__}")
    return reward


def _checked(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"--rewards {name!r}: must return a tensor of shape (N, G) = {tuple(shape)}, got {got}")
    value = value.float()
    if not value.isfinite().all():
        raise ValueError(f"--rewards {name!r}: returned NaN or infinity")
    return value


class Scored(NamedTuple):
    """Every term by name, before weights, and their weighted sum; all (N, G) float32."""

    terms: dict[str, Tensor]
    total: Tensor


class RewardTable(nn.Module):
    """The rewards of `weights` (see `parse_rewards`), each a term of its own.

    No term's value depends on the order of the terms or on which others are selected, save `temporal`, which is the
    sum of one bonus per base term selected; each of those bonuses is the same in every selection.

    Args:
        weights: name -> weight.
        regression, ranking, temporal: a configured reward in place of the default one.

    Raises ValueError if a `module:Class` cannot be imported and built, or is not an nn.Module.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        regression: RegressionReward | None = None,
        ranking: RankingReward | None = None,
        temporal: TemporalReward | None = None,
    ):
        super().__init__()
        built_in = {
            "regression": regression or RegressionReward(),
            "ranking": ranking or RankingReward(),
            "temporal": temporal or TemporalReward(),
            "format": FormatReward(),
        }
        self.weights = dict(weights)
        # A list, since a ModuleDict takes no name with a dot in it.
        self.rewards = nn.ModuleList(built_in[name] if name in built_in else _load(name) for name in weights)

    @property
    def needs_opponents(self) -> bool:
        """Whether the step must hold at least two videos."""
        return "ranking" in self.weights

    @property
    def needs_perturbed(self) -> bool:
        """Whether each video needs a second group of answers, to its perturbed copy."""
        return "temporal" in self.weights

    @property
    def base_terms(self) -> list[str]:
        """The selected terms that `temporal` compares."""
        return [name for name in BASE_TERMS if name in self.weights]

    def reward(self, name: str) -> nn.Module:
        return self.rewards[list(self.weights).index(name)]

    @torch.no_grad()
    def forward(
        self,
        answers: Answers,
        perturbed: Answers | None = None,
        opponents: Opponents | None = None,
        own: Tensor | None = None,
        perturbed_ok: Tensor | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Scored:
        """Score N groups; no argument is changed.

        `opponents` and `own` are as in `RankingReward` (needed if `needs_opponents`), `perturbed` (N groups),
        `perturbed_ok` and `sum_over_ranks` as in `TemporalReward` (needed if `needs_perturbed`).

        Raises ValueError if a reward returns anything but a finite (N, G) tensor.
        """
        terms = self.values([name for name in self.weights if name != "temporal"], answers, opponents, own)
        if "temporal" in self.weights:
            worse = self.values(self.base_terms, perturbed, opponents, own)
            terms["temporal"] = self.reward("temporal")(terms, worse, perturbed_ok, sum_over_ranks)
            terms = {name: terms[name] for name in self.weights}
        # Sorted, so that rounding too is independent of the order on the command line.
        total = sum(self.weights[name] * terms[name] for name in sorted(terms))  # Eq. (12)
        return Scored(terms, total)

    def values(
        self, names: Sequence[str], group: Answers, opponents: Opponents | None, own: Tensor | None
    ) -> dict[str, Tensor]:
        """The named terms (N, G) of N groups, `temporal` not among them."""
        context = {"ranking": (opponents, own)}
        return {n: _checked(n, self.reward(n)(group, *context.get(n, ())), group.scores.shape) for n in names}
