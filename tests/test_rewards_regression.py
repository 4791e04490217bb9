import math

import pytest
import torch

from rewards import Answers, RegressionReward

CONTENTS = [["3.50", "3.5", "4", "x"], ["1.00", "5.00", "2.345", ""]]
MOS = [3.4, 1.7]


def slow(content, mos, sigma, coarse_factor):
    try:
        score = float(content)
    except ValueError:
        return 0.0
    written = len(content.split(".")[1]) if "." in content else 0
    bell = math.exp(-((score - mos) ** 2) / (2 * sigma**2))
    return bell if written >= 2 else coarse_factor * bell


@pytest.mark.parametrize(("sigma", "coarse_factor"), [(0.5, 0.8), (1.3, 1.0), (0.01, 0.0)])
def test_equals_the_slow_version(sigma, coarse_factor):
    texts = [[f"<answer>{content}</answer>" for content in group] for group in CONTENTS]
    reward = RegressionReward(sigma, coarse_factor)(Answers.from_texts(texts, torch.tensor(MOS)))
    expected = [[slow(content, mos, sigma, coarse_factor) for content in group] for group, mos in zip(CONTENTS, MOS)]
    torch.testing.assert_close(reward, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_defaults_and_trailing_zeros():
    texts = [[f"<answer>{content}</answer>" for content in ("4.00", "4.0", "4")]]
    reward = RegressionReward()(Answers.from_texts(texts, torch.tensor([4.5])))[0].tolist()
    assert reward == pytest.approx([math.exp(-0.5), 0.8 * math.exp(-0.5), 0.8 * math.exp(-0.5)])


@pytest.mark.parametrize("bad", [{"sigma": 0}, {"sigma": math.nan}, {"coarse_factor": -0.1}, {"coarse_factor": 1.1}])
def test_refuses_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RegressionReward(**bad)
