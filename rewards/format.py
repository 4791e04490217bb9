"""Format reward: did the model think first and answer after, in the tags it was asked for?

N videos, G answers per video.
"""

import torch
from torch import Tensor, nn

from rewards.answers import Answers

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def well_formed(text: str) -> bool:
    """Whether the stripped text is `<think>...</think>`, white space, `<answer>...</answer>`, each tag once.

    The contents are free: a readable score is what the score rewards pay for. Takes time linear in the text.

    >>> well_formed("<think>Mild blur.</think> <answer>3.50</answer>")
    True
    >>> well_formed("<think>a</think><answer>1</answer> or <answer>2</answer>")
    False
    """
    text = text.strip()
    thought, _, answer = text.partition("</think>")
    return (
        all(text.count(tag) == 1 for tag in _TAGS)
        and thought.startswith("<think>")
        and answer.lstrip().startswith("<answer>")
        and answer.endswith("</answer>")
    )


class FormatReward(nn.Module):
    """1 for a well-formed answer, else 0.

    Source: released code, whose pattern `<think>.*?</think>\\s*<answer>.*?</answer>` also lets a tag recur inside a
    block, because `.*?` stretches over it; here every tag stands exactly once, and white space around the whole
    text is ignored.
    """

    def forward(self, answers: Answers) -> Tensor:
        """(N, G) of 0 or 1."""
        reward = [[float(well_formed(text)) for text in group] for group in answers.texts]  # Eq. (7)
        return torch.tensor(reward, device=answers.mos.device)
