import math
import statistics

import pytest
import torch

from rewards import REASONS, Answers


def answers(groups, mos=None):
    texts = [[f"<answer>{content}</answer>" for content in group] for group in groups]
    return Answers.from_texts(texts, torch.tensor([3.0] * len(groups) if mos is None else mos))


GROUPS = [["3.10", "3.4", "4"], ["2.00", "x", "4.25"], ["x", "5.00", ""], ["x", "9", "-1"], ["3.3", "3.3", "3.3"]]


def test_tensors_hold_what_was_parsed():
    batch = answers(GROUPS)
    assert (
        batch.scores.dtype == torch.float32 and batch.decimals.dtype == torch.int64 and batch.valid.dtype == torch.bool
    )
    assert batch.decimals.tolist() == [[2, 1, 0], [2, -1, 2], [-1, 2, -1], [-1, -1, -1], [1, 1, 1]]
    for n, group in enumerate(batch.parsed):
        for g, parsed in enumerate(group):
            assert batch.valid[n, g] == (parsed.score is not None)
            assert (
                math.isnan(batch.scores[n, g])
                if parsed.score is None
                else math.isclose(batch.scores[n, g], parsed.score, rel_tol=1e-6)
            )


def test_statistics_skip_unparsed_answers():
    batch = answers(GROUPS)
    for n, group in enumerate(batch.parsed):
        scores = [parsed.score for parsed in group if parsed.score is not None]
        assert batch.count()[n] == len(scores)
        assert batch.mean()[n].item() == pytest.approx(statistics.mean(scores) if scores else math.nan, nan_ok=True)
        assert batch.variance()[n].item() == pytest.approx(
            statistics.variance(scores) if len(scores) > 1 else 0, abs=1e-6
        )


def test_single_answer_group():
    batch = answers([["3.5"]])
    assert (batch.count().item(), batch.mean().item(), batch.variance().item()) == (1, 3.5, 0)


def test_failures_are_counted_by_reason():
    failures = answers(GROUPS).failures()
    assert failures == {reason: 0 for reason in REASONS} | {"not_a_number": 4, "empty": 1, "out_of_range": 1}


@pytest.mark.parametrize("texts", [[], [[]], [["a"], ["a", "b"]]])
def test_refuses_ragged_groups(texts):
    with pytest.raises(ValueError, match="texts must be"):
        Answers.from_texts(texts, torch.full((len(texts),), 3.0))


@pytest.mark.parametrize("mos", [[3.0], [3.0, math.nan], [[3.0, 3.0]]])
def test_refuses_bad_mos(mos):
    with pytest.raises(ValueError, match="mos must be"):
        Answers.from_texts([["a"], ["b"]], torch.tensor(mos))
