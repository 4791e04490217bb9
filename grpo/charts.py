"""Where data lie in a drawing: the numbers of an inline SVG, which grpo/pages/charts.html draws.

A drawing is WIDTH x HEIGHT units, about the pixels of a phone; y points down in it, and up in the data.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 350, 10, 208  # of the area of the data
COLOURS = 8  # --series-0 and up in base.html
DASHES = ("none", "7 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Axes:
    """The ranges of the data, (low, high) with low < high."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> "Axes":
        """Axes that end at ticks and hold all points, of which there is one at least."""
        return cls(*map(whole_ticks, zip(*points)))

    def px(self, x: float) -> float:
        return round(LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (RIGHT - LEFT), 1)

    def py(self, y: float) -> float:
        return round(BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (BOTTOM - TOP), 1)

    def line(self, points: Iterable[tuple[float, float]]) -> str:
        """The points joined, as the `d` of a path."""
        return "M" + "L".join(f"{self.px(x):g} {self.py(y):g}" for x, y in points)

    def dots(self, points: Iterable[tuple[float, float]]) -> str:
        """Lines without length, which round ends make dots: thousands of them in one path."""
        return "".join(f"M{self.px(x):g} {self.py(y):g}h0" for x, y in points)

    def x_ticks(self) -> list[float]:
        return ticks(*self.x)

    def y_ticks(self) -> list[float]:
        return ticks(*self.y)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, as many as go, `most` at most.

    >>> ticks(0, 250)
    [0, 50, 100, 150, 200, 250]
    """
    step = tick_step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def tick_step(low: float, high: float, most: int = 6) -> float:
    power = math.floor(math.log10((high - low) / most))
    steps = (factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= most - 1 + 1e-9)
    return int(step) if step >= 1 else step


def whole_ticks(values: Iterable[float]) -> tuple[float, float]:
    """The smallest range from tick to tick that holds the values; around a single value, one of length 1 or more.

    Values that differ by rounding, as means of a constant do, are a single one.
    """
    values = list(values)
    low, high = min(values), max(values)
    if math.isclose(low, high):
        low, high = low - 0.5 * max(1.0, abs(low)), high + 0.5 * max(1.0, abs(high))
    step = tick_step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def style(index: int) -> dict:
    """Colour and dash of the line of a run: they come together again after COLOURS x len(DASHES) runs only."""
    return {"colour": index % COLOURS, "dash": DASHES[(index + index // COLOURS) % len(DASHES)]}


def thinned(points: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    """Means of so many neighbours; the last group may have fewer."""
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(sum(values) / len(values) for values in zip(*group)) for group in groups]
