"""A first guess at removals: the effect of each block alone, and the best path through all blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tokbench.searching.cost import Cost
from tokbench.searching.space import Removals, Space

# Shares of the tokens that one block alone removes to measure its effect.
_SHARES = (0.1, 0.25, 0.5)
_STEPS = 40  # of the bisection for the price of cost


def sensitivities(
    space: Space, distance: Callable[[Removals], float], is_over: Callable[[], bool]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each block that can remove tokens: shares that it removes, and the distance if no other removes any.

    Empty if it `is_over` before all blocks are done.
    """
    patches, found = space.tokens - space.prefix, {}
    for block in space.acting:
        if is_over():
            return {}
        most = space.most(block, space.tokens)
        counts = sorted({min(round(share * patches), most) for share in _SHARES} - {0})
        alone = [tuple(count if other == block else 0 for other in range(space.depth)) for count in counts]
        if alone:
            found[block] = np.array([0, *counts]) / patches, np.array([0.0, *map(distance, alone)])
    return found


def cheapest_path(space: Space, cost: Cost, most: float, found: dict[int, tuple[np.ndarray, np.ndarray]]) -> Removals:
    """The removals of least distance that cost at most `most`, if blocks' distances add up and depend on the share of
    tokens removed: dynamic programming over (block, tokens), with a Lagrange multiplier found by bisection."""
    tokens = space.tokens
    price_of = np.full((tokens + 1, tokens + 1), np.inf)
    for before in range(space.prefix + 1, tokens + 1):
        for after in range(space.prefix + 1, before + 1):
            price_of[before, after] = cost.share_of_block(before, after)
    losses = [_losses(space, block, found.get(block)) for block in range(space.depth)]

    def path(price: float) -> Removals:
        rest, choices = np.zeros(tokens + 1), []
        for loss in reversed(losses):
            through = loss + price * price_of + rest
            choices.append(through.argmin(1))
            rest = through.min(1)
        now, removed = tokens, []
        for choice in reversed(choices):
            after = int(choice[now])
            removed.append(now - after + space.returned if after < now else 0)
            now = after
        return tuple(removed)

    low, high = -9.0, 6.0  # decimal logarithms of the price
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(path(10**middle)) > most else (low, middle)
    return path(10**high)


def _losses(space: Space, block: int, seen: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """The distance if a block goes from n tokens to m: (n, m), ∞ if it cannot. Beyond the measured shares it grows with
    the square of the share."""
    losses = np.full((space.tokens + 1, space.tokens + 1), np.inf)
    for before in range(space.prefix + 1, space.tokens + 1):
        losses[before, before] = 0
        removed = np.arange(1, space.most(block, before) + 1)
        after = before - removed + space.returned
        if seen is not None and removed.size:
            shares = removed / (before - space.prefix)
            last = np.maximum(shares / seen[0][-1], 1)
            losses[before, after] = np.interp(shares, *seen) * last**2
            losses[before, before] = 0  # if the block adds as many as it removes
    return losses
