"""The metrics of many resamples at once. A resample is how often it holds each video: counts (B, n), rows summing to n.

The videos are sorted once, and everything then follows from sums over runs of them: no resample is sorted again.
Legend: B resamples, n videos, d distinct values.
"""

from collections.abc import Iterator

import numpy as np

from rewards.logistic import fit_weighted

METRICS = ("srcc", "plcc", "krcc", "rmse", "plcc_fitted", "rmse_fitted")
AT_ONCE = 2**20  # numbers of an array (B, n): 8 MiB


def resample_counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Counts (B, n) int64 of `resamples` bootstrap resamples of n videos, in parts of bounded size."""
    rng = np.random.default_rng(seed)
    part = max(1, AT_ONCE // n)
    for start in range(0, resamples, part):
        rows = min(part, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)


class Resampled:
    """The metrics of scores (n,) and MOS (n,), both finite, n >= 3, on resamples.

    Calling it with counts (B, n) and names out of METRICS gives name -> (B,) float64, NaN where undefined: all scores,
    or all MOS, of the resample are equal, or no logistic could be fitted.
    """

    def __init__(self, scores: np.ndarray, mos: np.ndarray):
        self.order = np.lexsort((-mos, scores))  # MOS falls where scores are equal: see `_kendall`
        self.x, self.y = scores[self.order], mos[self.order]
        self.by_mos = np.argsort(self.y, kind="stable")
        self.x_starts, self.x_group = _groups(self.x)
        self.y_starts, y_group = _groups(self.y[self.by_mos])
        self.y_group = np.empty_like(y_group)
        self.y_group[self.by_mos] = y_group
        self.pair_starts, _ = _groups(self.x, self.y)
        self.merges = list(_merges(self.y))

    def __call__(self, counts: np.ndarray, names: tuple[str, ...] = METRICS) -> dict[str, np.ndarray]:
        counts = counts[:, self.order].astype(float)
        x_counts = np.add.reduceat(counts, self.x_starts, axis=1)
        y_counts = np.add.reduceat(counts[:, self.by_mos], self.y_starts, axis=1)
        n = counts.shape[1]
        defined = (x_counts.max(1) < n) & (y_counts.max(1) < n)
        values = {name: np.full(len(counts), np.nan) for name in names}
        if "rmse" in names:
            values["rmse"] = np.sqrt(counts @ (self.x - self.y) ** 2 / n)
        counts, x_counts, y_counts = counts[defined], x_counts[defined], y_counts[defined]
        if not len(counts):
            return values
        if "srcc" in names:
            values["srcc"][defined] = self._spearman(counts, x_counts, y_counts)
        if "krcc" in names:
            values["krcc"][defined] = self._kendall(counts, x_counts, y_counts)
        if "plcc" in names:
            values["plcc"][defined] = self._pearson(counts)
        if {"plcc_fitted", "rmse_fitted"} & set(names):
            plcc, rmse = self._fitted(counts, x_counts)
            for name, value in (("plcc_fitted", plcc), ("rmse_fitted", rmse)):
                if name in names:
                    values[name][defined] = value
        return values

    def _pearson(self, counts: np.ndarray) -> np.ndarray:
        x, y = (column - (counts @ column / counts.shape[1])[:, None] for column in (self.x, self.y))
        xx, yy, xy = (np.einsum("bn,bn,bn->b", counts, a, b) for a, b in ((x, x), (y, y), (x, y)))
        return xy / np.sqrt(xx * yy)

    def _spearman(self, counts: np.ndarray, x_counts: np.ndarray, y_counts: np.ndarray) -> np.ndarray:
        """Pearson's correlation of ranks; equal values share the mean of theirs."""
        x_ranks, y_ranks = (_centred_ranks(grouped) for grouped in (x_counts, y_counts))
        xx, yy = (np.einsum("bd,bd,bd->b", c, r, r) for c, r in ((x_counts, x_ranks), (y_counts, y_ranks)))
        xy = np.einsum("bn,bn,bn->b", counts, x_ranks[:, self.x_group], y_ranks[:, self.y_group])
        return xy / np.sqrt(xx * yy)

    def _kendall(self, counts: np.ndarray, x_counts: np.ndarray, y_counts: np.ndarray) -> np.ndarray:
        """Tau-b. A merge sort by MOS of the videos, which are in order of score, would meet the concordant pairs.

        Where scores are equal MOS falls, so a pair with the first one's MOS below the second's is concordant.
        """
        concordant = np.zeros(len(counts))
        for lower, upper, first, last in self.merges:
            below = np.cumsum(counts[:, lower], axis=1)
            below = np.concatenate([np.zeros((len(counts), 1)), below], axis=1)
            concordant += np.einsum("bk,bk->b", counts[:, upper], below[:, last] - below[:, first])
        pairs, x_ties, y_ties, both = (
            (grouped * (grouped - 1)).sum(1) / 2
            for grouped in (
                counts.sum(1, keepdims=True),
                x_counts,
                y_counts,
                np.add.reduceat(counts, self.pair_starts, axis=1),
            )
        )
        discordant = pairs - concordant - x_ties - y_ties + both
        return (concordant - discordant) / np.sqrt((pairs - x_ties) * (pairs - y_ties))

    def _fitted(self, counts: np.ndarray, x_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """PLCC and RMSE after a logistic fitted to each resample."""
        n = counts.shape[1]
        y = self.y - self.y.mean()
        squares = counts @ y**2 - (counts @ y) ** 2 / n
        weighted = np.add.reduceat(counts * y, self.x_starts, axis=1)
        fits = fit_weighted(self.x[self.x_starts], x_counts, weighted, squares)
        plcc = np.where(fits.converged & (fits.plcc > 0), fits.plcc, np.nan)
        return plcc, np.sqrt(squares * (1 - plcc**2) / n)


def _groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal values start (d,), and the number of its run for every entry (n,)."""
    new = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(np.r_[True, new]), np.r_[0, np.cumsum(new)]


def _centred_ranks(grouped: np.ndarray) -> np.ndarray:
    """(B, d) mean rank of each value, less the mean of all ranks, from how often it occurs."""
    return np.cumsum(grouped, axis=1) - grouped / 2 - grouped.sum(1, keepdims=True) / 2


def _merges(y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The merges of a merge sort of y (n,), all of one size together.

    Each is (lower, upper, first, last): the entries of left halves, by half and then by y; those of right halves, k of
    them; and for each of these k that its own left half has the entries lower[first:last] with a smaller y.
    """
    place = np.arange(len(y))
    size = 1
    while size < len(y):
        right, block = place // size % 2 == 1, place // (2 * size)
        order = np.lexsort((~right, y, block))  # of equal y the right one comes first: nothing equal is below it
        lefts = np.cumsum(~right[order])
        upper = order[right[order]]
        yield order[~right[order]], upper, block[upper] * size, lefts[right[order]]
        size *= 2
