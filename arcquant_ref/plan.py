"""Two-sided residuals: which channels' activations and which channels' weights get the extra columns.

The paper repairs activations only, the channels with the largest amax. Here every 16 extra columns go where
they remove most of the output's squared error, on either side (docs/two_sided.md derives it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .formats import BLOCK, Float32, Float64
from .select import Selection


def error_energy(
    x: ArrayLike, w: ArrayLike, tokens: ArrayLike | None = None, outputs: ArrayLike | None = None
) -> Float64:
    """(K, K), whose sum over i and j of any set of channels is the mean over tokens of ‖Σ_k x_k w_k‖² there.

    `x` (T, K) and `w` (N, K) are one error and what it is multiplied with: x − x̂ and ŵ, or x and w − ŵ; they
    count as float32, and so do the sums over tokens and outputs. `tokens` (T,) and `outputs` (N,) weight the
    mean and the norm; 1 unless given. Raises ValueError for different K, T or N.

    >>> error_energy(np.eye(2), np.ones((3, 2)))
    array([[1.5, 0. ],
           [0. , 1.5]])
    """
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    checks.same_depth("x", x.shape[-1], "w", w.shape[-1])
    weighted_x, weighted_w = _weighted("tokens", tokens, "x", x), _weighted("outputs", outputs, "w", w)
    return (weighted_x.T @ x).astype(np.float64) / len(x) * (weighted_w.T @ w)


def _weighted(name: str, weights: ArrayLike | None, rows: str, x: Float32) -> Float32:
    if weights is None:
        return x
    weights = np.asarray(weights, np.float32)
    checks.same_shape(name, weights.shape, f"a column of {rows}", x.shape[:1])
    return x * weights[:, None]


@dataclass(frozen=True, eq=False)
class Step:
    """16 extra columns: the error energy they remove, the side they repair and the channels."""

    gain: float
    side: Literal["activation", "weight"]
    channels: NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A channel order of one layer and what to repair, the best first.

    order  (K,) the channels, whose blocks of 16 share scales
    energy  the error energy of both sides without any residual
    steps  each with its gain after those before it
    """

    order: NDArray[np.int64]
    energy: float
    steps: list[Step]

    @property
    def remaining(self) -> Float64:
        """The error energy that 0, 1, 2, … steps leave, if what is repaired has no error."""
        return self.energy - np.cumsum([0.0, *(step.gain for step in self.steps)])

    def selection(self, steps: int, channel_amax: ArrayLike) -> Selection:
        """The first steps as a selection: repaired activations are last in the order, best last.

        Raises ValueError for fewer than 0 or more than all steps, or a bad channel_amax.
        """
        steps = checks.steps(steps, len(self.steps))
        chosen: dict[str, list[NDArray[np.int64]]] = {"activation": [], "weight": []}
        for step in self.steps[:steps]:
            chosen[step.side].append(step.channels)
        none = [np.zeros(0, np.int64)]
        last = np.concatenate(none + chosen["activation"][::-1])
        return Selection(
            order=np.concatenate([self.order[~np.isin(self.order, last)], last]),
            num_residual=len(last),
            channel_amax=checks.channel_amax(channel_amax, BLOCK),
            weight_channels=np.concatenate(none + chosen["weight"]),
        )


def plan(order: NDArray[np.int64], activation: Float64, weight: Float64) -> Plan:
    """Greedy: the block of activations, or the 16 channels of weights, that removes more, again and again.

    `activation` and `weight` are the error energies (K, K) of the two sides, their channels in `order`.
    A set R of repaired channels removes 2 Σ_{i ∈ R, j} E_ij − Σ_{i, j ∈ R} E_ij of what is left. A repaired
    activation must be where its block is: the block that removes most. Weights are gathered from anywhere:
    the 16 channels that remove most one by one, not the best 16 together. Ends when nothing is gained, which
    may be before all is repaired: errors that cancel are worse off alone. Raises ValueError for energies that
    are not (K, K), TypeError or ValueError for an order that is no permutation.
    """
    order = checks.channel_order(order)
    checks.multiple_of("K", len(order), BLOCK)
    for name, energy in (("activation", activation), ("weight", weight)):
        checks.same_shape(name, energy.shape, "order × order", (len(order), len(order)))
    sides = _Side(activation), _Side(weight)
    steps: list[Step] = []
    while True:
        offers = sides[0].best_block(), sides[1].best_channels()
        side = int(offers[1][0] > offers[0][0])
        gain, positions = offers[side]
        if gain <= 0:
            break
        sides[side].repair(positions)
        steps.append(Step(gain, "weight" if side else "activation", order[positions]))
    return Plan(order=order, energy=float(activation.sum() + weight.sum()), steps=steps)


class _Side:
    """The error energy that is left of one side."""

    def __init__(self, energy: Float64) -> None:
        self.energy = energy
        self.left = np.ones(len(energy), bool)
        self.sums = energy.sum(axis=1)  # of each channel with all that are left
        of_blocks = energy.reshape(len(energy) // BLOCK, BLOCK, -1, BLOCK)
        self.inside = np.einsum("bibj->b", of_blocks)  # of each block with itself

    def gain(self, positions: NDArray[np.int64]) -> float:
        return float(2 * self.sums[positions].sum() - self.energy[np.ix_(positions, positions)].sum())

    def best_block(self) -> tuple[float, NDArray[np.int64]]:
        gains = 2 * self.sums.reshape(-1, BLOCK).sum(axis=1) - self.inside
        first = BLOCK * int(np.where(self.left[::BLOCK], gains, -np.inf).argmax())
        return self._offer(np.arange(first, first + BLOCK))

    def best_channels(self) -> tuple[float, NDArray[np.int64]]:
        alone = np.where(self.left, 2 * self.sums - np.diagonal(self.energy), -np.inf)
        return self._offer(np.argsort(alone, kind="stable")[-BLOCK:])

    def _offer(self, positions: NDArray[np.int64]) -> tuple[float, NDArray[np.int64]]:
        return (self.gain(positions) if self.left[positions].all() else 0.0), positions

    def repair(self, positions: NDArray[np.int64]) -> None:
        self.left[positions] = False
        self.sums -= self.energy[:, positions].sum(axis=1)


def share(plans: Sequence[Sequence[Plan]], costs: Sequence[int], budget: float) -> list[tuple[int, int]]:
    """For every layer one of its plans and a number of steps, (plan, steps): within the budget, the least
    remaining error energy of all layers together.

    costs[i] is what 16 columns of layer i cost, budget the sum of costs that may be spent. Each layer takes
    what minimizes remaining + price · cost; the price is the lowest the budget allows. So no other choice of
    the same cost, or of less, leaves less (Everett 1963). What stays of the budget is less than all that is
    bought at the next lower price costs; equal layers buy together. Raises ValueError for a negative budget
    or costs that are not one positive number for each layer.
    """
    checks.costs(costs, len(plans), budget)
    remaining = [[p.remaining for p in layer] for layer in plans]

    def choose(price: float) -> list[tuple[int, int]]:
        chosen = []
        for layer, cost in zip(remaining, costs):
            totals = [r + price * cost * np.arange(len(r)) for r in layer]
            _, steps, of = min(
                (t.min(), int(t.argmin()), i) for i, t in enumerate(totals)
            )  # of equals the first
            chosen.append((of, steps))
        return chosen

    def spent(chosen: list[tuple[int, int]]) -> int:
        return sum(cost * steps for (_, steps), cost in zip(chosen, costs))

    if spent(choose(0.0)) <= budget:
        return choose(0.0)
    high = max(2 * (r[0] - r.min()) / cost for layer, cost in zip(remaining, costs) for r in layer)  # none
    low = high * 1e-30
    for _ in range(100):
        price = np.sqrt(low * high)
        low, high = (low, price) if spent(choose(price)) <= budget else (price, high)
    return choose(high)
