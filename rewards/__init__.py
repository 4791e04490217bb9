"""Rewards: completion text and mean opinion scores in, named values (N, G) out. See docs/rewards.md."""

from rewards.answers import Answers
from rewards.format import FormatReward
from rewards.parse import REASONS, Parsed, parse_answer
from rewards.ranking import Opponents, RankingReward
from rewards.regression import RegressionReward
from rewards.table import RewardTable, Scored, parse_rewards
from rewards.temporal import TemporalReward

__all__ = [
    "REASONS",
    "Answers",
    "FormatReward",
    "Opponents",
    "Parsed",
    "RankingReward",
    "RegressionReward",
    "RewardTable",
    "Scored",
    "TemporalReward",
    "parse_answer",
    "parse_rewards",
]
