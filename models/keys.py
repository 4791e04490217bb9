"""One way to say which keys of a checkpoint are not those of a network."""

from collections.abc import Iterable, Mapping

import torch

SHOWN = 20  # keys of a kind that are listed


def describe(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> str:
    """What is wrong, in one line; '' if nothing is.

    >>> describe([], ["b", "a"], ["c (2,), not (3,)"])
    "2 unexpected keys: ['a', 'b']; 1 mismatched keys: ['c (2,), not (3,)']"
    """
    problems = {"missing": sorted(missing), "unexpected": sorted(unexpected), "mismatched": sorted(mismatched)}
    return "; ".join(
        f"{len(keys)} {problem} keys: {keys[:SHOWN]}{' and more' if len(keys) > SHOWN else ''}"
        for problem, keys in problems.items()
        if keys
    )


def compare(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], optional: Iterable[str] = ()) -> str:
    """`describe` for two sets of keys with their shapes, of which the `optional` ones may be missing."""
    shapes = [(key, tuple(found[key]), tuple(expected[key])) for key in found.keys() & expected.keys()]
    mismatched = [f"{key} {one}, not {other}" for key, one, other in shapes if one != other]
    return describe(expected.keys() - found.keys() - set(optional), found.keys() - expected.keys(), mismatched)
