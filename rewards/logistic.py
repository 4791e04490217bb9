"""The mapping from scores to MOS that the field fits before PLCC and RMSE, for many weightings of the videos at once.

    f(x) = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)),   b1 >= b2

is the four-parameter logistic of the Video Quality Experts Group, fitted by least squares. For a given midpoint b3 and
width b4 the best b1 and b2 are a linear regression, so only two parameters are searched for (variable projection,
Golub and Pereyra 1973): from the best point of a grid by Levenberg-Marquardt, within limits. b1 >= b2 keeps the curve
increasing, so that it cannot turn scores upside down. With R the range of the scores, b4 is from R / 100, nearly a
step, to 10 R, nearly a straight line, and b3 is at most 2 b4 outside the range, where the curve is nearly exponential.

Legend: m distinct scores, B weightings of the videos (all of weight 1, or how often a resample holds each).
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import expit

# Of a curve's shape (place, log b4) in units of R: b3 is in the middle of the scores, or as far off as it may be.
BOX = np.array([[-1.0, 1.0], [math.log(0.01), math.log(10.0)]])
GRID = np.array([(place, width) for place in np.linspace(*BOX[0], 31) for width in np.linspace(*BOX[1], 8)])
OUTSIDE = 2.0
LEAST_SPREAD = 1e-4  # standard deviation of the curve over the scores, its height being 1
TOLERANCE = 1e-10  # share of the squares that one more step would explain
STEPS = 100


class Logistic(NamedTuple):
    """The fitted curve. Called with scores of any shape, on the scale they were fitted on, it gives MOS."""

    b1: float
    b2: float
    b3: float
    b4: float

    def __call__(self, scores) -> np.ndarray:
        return self.b2 + (self.b1 - self.b2) * expit((np.asarray(scores) - self.b3) / self.b4)


class Fits(NamedTuple):
    """Of B fits: `plcc` (B,), the correlation of curve and MOS; where that is not above 0, the best curve is flat.

    `converged` (B,) bool, and `shape` (B, 2), as in BOX.
    """

    plcc: np.ndarray
    converged: np.ndarray
    shape: np.ndarray


def fit_logistic(scores: np.ndarray, mos: np.ndarray) -> tuple[Logistic | None, str | None]:
    """The curve for scores (n,) and MOS (n,), finite, neither all equal; or None and the reason why there is none."""
    x, group, weights = np.unique(scores, return_inverse=True, return_counts=True)
    centre = np.mean(mos)
    weighted = np.bincount(group, mos - centre)
    fits = fit_weighted(x, weights[None].astype(float), weighted[None], np.sum((mos - centre) ** 2, keepdims=True))
    if not fits.converged[0]:
        return None, f"the logistic fit did not converge in {STEPS} steps"
    if not fits.plcc[0] > 0:
        return None, "no increasing curve fits better than a constant"
    b3, b4 = (x[-1] - x[0]) * np.stack(_midpoint_and_width(fits.shape[0]))
    curve = Logistic(1.0, 0.0, float(x[0] + b3), float(b4))
    unit = curve(scores)
    height = np.sum((unit - unit.mean()) * (mos - centre)) / np.sum((unit - unit.mean()) ** 2)
    b2 = centre - height * unit.mean()
    return curve._replace(b1=float(b2 + height), b2=float(b2)), None


def fit_weighted(x: np.ndarray, weights: np.ndarray, weighted_mos: np.ndarray, squares: np.ndarray) -> Fits:
    """B fits at once.

    Args:
        x: (m,) distinct scores, ascending, m >= 2.
        weights: (B, m) total weight of the videos with each score.
        weighted_mos: (B, m) weighted sum of their MOS.
        squares: (B,) weighted sum of squares of all MOS around their weighted mean, above 0.
    """
    x = (x - x[0]) / (x[-1] - x[0])
    theta = GRID[np.argmax(_grid_plcc(x, weights, weighted_mos), axis=1)]
    state = _moments(theta, x, weights, weighted_mos)
    damping = np.full(len(theta), 1e-3)
    gained = np.full(len(theta), np.inf)  # by the last step that was taken
    active = np.arange(len(theta))
    for _ in range(STEPS):
        step, decrement = _step(theta[active], state[0][active], state[1][active], squares[active], damping[active])
        going = (decrement > TOLERANCE) & (gained[active] > TOLERANCE) & (damping[active] < 1e8)
        active, step = active[going], step[going]
        if not len(active):
            break
        trial = np.clip(theta[active] + step, BOX[:, 0], BOX[:, 1])
        moments = _moments(trial, x, weights[active], weighted_mos[active])
        gain = _gain(*moments) - _gain(state[0][active], state[1][active])
        better = gain > 0
        damping[active] *= np.where(better, 0.1, 10.0)
        accepted = active[better]
        gained[accepted] = gain[better] / squares[accepted]
        theta[accepted] = trial[better]
        for kept, new in zip(state, moments):
            kept[accepted] = new[better]
    plcc = np.sqrt(np.maximum(_gain(*state), 0) / squares)
    return Fits(np.minimum(plcc, 1.0), ~np.isin(np.arange(len(theta)), active), theta)


def _midpoint_and_width(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """b3 and b4 (...) of shapes (..., 2), in units of R and from the lowest score on."""
    width = np.exp(theta[..., 1])
    return 0.5 + theta[..., 0] * (0.5 + OUTSIDE * width), width


def _unit(theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve from 0 to 1 at x and its argument, both (K, m), for K shapes."""
    midpoint, width = _midpoint_and_width(theta[:, None])
    z = (x - midpoint) / width
    return 1 / (1 + np.exp(-z)), z


def _grid_plcc(x: np.ndarray, weights: np.ndarray, weighted_mos: np.ndarray) -> np.ndarray:
    """Covariance with the MOS over standard deviation (B, K) of the curves of the grid."""
    curves = _unit(GRID, x)[0].T
    total = weights.sum(1, keepdims=True)
    mean = weights @ curves / total
    variance = weights @ curves**2 / total - mean**2
    covariance = weighted_mos @ curves - mean * weighted_mos.sum(1, keepdims=True)
    return np.where(variance > LEAST_SPREAD**2, covariance, -np.inf) / np.sqrt(np.maximum(variance, LEAST_SPREAD**2))


def _moments(
    theta: np.ndarray, x: np.ndarray, weights: np.ndarray, weighted_mos: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centred second moments (B, 3, 3) of the curve from 0 to 1 and its two derivatives; the same with the MOS (B, 3).

    A curve that hardly varies over the scores explains nothing: then the latter is 0.
    """
    curve, z = _unit(theta, x)
    slope = curve * (1 - curve)
    by_place = -(0.5 * np.exp(-theta[:, 1:]) + OUTSIDE)
    basis = np.stack([curve, slope * by_place, slope * (-z - OUTSIDE * theta[:, :1])], 1)
    weighted = basis * weights[:, None]
    total = weights.sum(1)
    sums = weighted.sum(2)
    second = weighted @ basis.swapaxes(1, 2) - sums[:, :, None] * sums[:, None] / total[:, None, None]
    cross = (basis @ weighted_mos[..., None])[..., 0] - sums * (weighted_mos.sum(1) / total)[:, None]
    flat = second[:, 0, 0] <= LEAST_SPREAD**2 * total
    second[flat, 0, 0], cross[flat] = 1, 0
    return second, cross


def _gain(second: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """(B,) by how much the increasing curve lowers the sum of squares; below 0 where only a falling one would."""
    return cross[:, 0] * np.abs(cross[:, 0]) / second[:, 0, 0]


def _step(
    theta: np.ndarray, second: np.ndarray, cross: np.ndarray, squares: np.ndarray, damping: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The Levenberg-Marquardt step (B, 2), and the share (B,) of all squares that an undamped one promises to gain."""
    height = np.maximum(cross[:, 0], 0) / second[:, 0, 0]
    ratio = second[:, 0, 1:] / second[:, :1, 0]  # b1 and b2 follow the other two: their part is projected out
    gradient = (cross[:, 1:] - ratio * cross[:, :1]) * (height / squares)[:, None]
    hessian = (second[:, 1:, 1:] - ratio[:, :, None] * second[:, :1, 1:]) * (height**2 / squares)[:, None, None]
    free = ~((theta <= BOX[:, 0]) & (gradient < 0) | (theta >= BOX[:, 1]) & (gradient > 0))
    gradient = (gradient * free)[..., None]
    hessian = hessian * (free[:, :, None] & free[:, None] | np.eye(2, dtype=bool)) + 1e-14 * np.eye(2)
    decrement = (gradient * np.linalg.solve(hessian, gradient)).sum((1, 2))
    damped = hessian * (1 + damping[:, None, None] * np.eye(2))
    return np.linalg.solve(damped, gradient)[..., 0], decrement
