"""Signs of trouble in the numbers that every step writes down anyway: told once, counted in summary.json.

A level is the median over the last steps, as one odd draw of videos is no trouble. What is said of the demo below comes
from 50 recorded runs of it and of its ablations.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple

LEVEL = 10  # steps of a level
KL_NOW, KL_BEFORE = 5, 50  # steps of the KL's level now and before: a jump should be heard of early
KL_FLOOR = 0.1  # nats a token: below it a KL that multiplies is a run that has just begun


class Sign(NamedTuple):
    """A number of a `Health`, None if it is not known yet, that is trouble when `above` or `below`."""

    number: Callable[["Health"], float | None]
    says: str
    above: float = math.inf
    below: float = -math.inf


SIGNS = {
    # Any: the step taught nothing, and what overflows once does so again.
    "skipped": Sign(
        lambda health: health.newest("skipped"), "{:.0f} updates left out: loss or gradient not finite", above=0
    ),
    # The demo's warm-up reaches 3.5 times; single steps, on which k3 is heavy-tailed, do not count.
    "kl_jump": Sign(lambda health: health.kl_growth(), "the KL is {:.1f} times what it was", above=5),
    # The demo ends at 0.62 of it or more. At a tenth, answers of a group are copies, and nothing is left to compare.
    "entropy_collapse": Sign(
        lambda health: health.entropy_left(), "the entropy of answers is {:.2f} of what it was at the start", below=0.1
    ),
    # In MOS points. MOS themselves spread by 0.8 or so; the demo's model starts at 0.25 and never fell below 0.09.
    "score_collapse": Sign(
        lambda health: health.level("score_std"), "all videos get one score: their means spread by {:.3f}", below=0.05
    ),
    # A cut answer has no score, whatever it would have said. The demo stays below 0.05.
    "truncated": Sign(
        lambda health: health.level("truncated"), "{:.0%} of the answers end at --max-new-tokens", above=0.2
    ),
    # Half of what is computed is for nothing. The demo has none.
    "zero_variance": Sign(
        lambda health: health.level("zero_variance"), "{:.0%} of the groups have equal rewards", above=0.5
    ),
    # In SRCC, twice in a row: 0.05 is about the standard error of 0.8 with 64 videos.
    "srcc_falls": Sign(
        lambda health: health.srcc_lost(), "the reward rises, but validation SRCC is {:.3f} below its best", above=0.05
    ),
}


class Health:
    """What the rows of metrics.jsonl tell, fed one by one.

    rows: of the steps that a resumed run has behind it; what they say was told. `found` counts for each of SIGNS the
    `steps` that show it, with the `first` of them and the `number` there.
    """

    def __init__(self, rows: Iterable[dict] = ()):
        self.rows: deque[dict] = deque(maxlen=KL_NOW + KL_BEFORE)
        self.start: list[float] = []  # entropies
        self.validated: list[tuple[float, float]] = []  # SRCC and the reward's level, at each validation
        self.found = {name: {"steps": 0, "first": None, "number": None} for name in SIGNS}
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> list[str]:
        """A line for each sign that this step is the first to show."""
        self.rows.append(row)
        if len(self.start) < LEVEL and row["entropy"] is not None:
            self.start.append(row["entropy"])
        if row["val"] and row["val"]["srcc"] is not None:
            self.validated.append((row["val"]["srcc"], median(row["reward"]["mean"] for row in self.last(LEVEL))))
        lines = []
        for name, sign in SIGNS.items():
            number, found = sign.number(self), self.found[name]
            if number is not None and (number > sign.above or number < sign.below):
                found["steps"] += 1
                if found["steps"] == 1:
                    found |= {"first": row["step"], "number": number}
                    lines.append(f"step {row['step']}: {sign.says.format(number)} ({name})")
        return lines

    def last(self, steps: int, before: int = 0) -> list[dict]:
        """The rows of so many steps, up to that many steps ago."""
        end = max(0, len(self.rows) - before)
        return list(self.rows)[max(0, end - steps) : end]

    def newest(self, name: str) -> float:
        return self.rows[-1][name]

    def level(self, name: str, steps: int = LEVEL, before: int = 0) -> float | None:
        """Median of a metric; None unless half of so many steps are there and have it."""
        values = [row[name] for row in self.last(steps, before) if row[name] is not None]
        return median(values) if 2 * len(values) >= steps else None

    def kl_growth(self) -> float | None:
        now, before = self.level("kl", KL_NOW), self.level("kl", KL_BEFORE, before=KL_NOW)
        return None if now is None else now / max(before or 0.0, KL_FLOOR)

    def entropy_left(self) -> float | None:
        now = self.level("entropy")
        return now / median(self.start) if len(self.start) == LEVEL and now is not None and any(self.start) else None

    def srcc_lost(self) -> float | None:
        """How far the last two validations are below the best, if the reward is above what it was there."""
        if not self.rows[-1]["val"] or len(self.validated) < 3:
            return None
        (before, _), (now, reward) = self.validated[-2:]
        best, reward_there = max(self.validated)
        return best - max(before, now) if reward > reward_there else None
