"""The plan for residuals on both sides, and the shares of layers: against what trying everything finds."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from arcquant_ref import augment_activations, augment_weights, calibrate, quantize
from arcquant_ref import plan as planning
from arcquant_ref.formats import BLOCK
from arcquant_ref.plan import Plan, Step, error_energy, plan, share
from arcquant_ref.quantize import exact_values

small = st.integers(-8, 8)  # all sums of products of these are exact in float32


def integers(*shape):
    return arrays(np.float64, shape, elements=small)


@st.composite
def errors(draw):
    """x (T, K), w (N, K), tokens (T,) or None, outputs (N,) or None."""
    t, n, k = (draw(st.integers(1, most)) for most in (5, 4, 6))
    weights = [
        draw(st.one_of(st.none(), arrays(np.float64, size, elements=st.integers(0, 4)))) for size in (t, n)
    ]
    return draw(integers(t, k)), draw(integers(n, k)), *weights


@given(errors(), st.data())
def test_the_energy_of_some_channels_is_their_mean_squared_output_error(layer, data):
    x, w, tokens, outputs = layer
    energy = error_energy(x, w, tokens, outputs)
    assert energy.dtype == np.float64
    some = np.array(data.draw(st.lists(st.booleans(), min_size=x.shape[1], max_size=x.shape[1])))
    squared = (x[:, some] @ w[:, some].T) ** 2
    squared *= 1 if outputs is None else outputs
    per_token = squared.sum(axis=1) * (1 if tokens is None else tokens)
    # Integers below 2²⁴ until the mean; each entry of it is rounded once, by at most 2⁻⁵³ of Σ |E|
    limit = np.abs(energy).sum() * len(some) ** 2 * 2.0**-52
    assert abs(energy[np.ix_(some, some)].sum() - per_token.mean()) <= limit


def test_energy_of_a_quantized_layer():
    """Both sides, floats: what the plan predicts without residuals is what the product errs by, if the two
    errors are taken one at a time."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((50, 64)).astype(np.float32), rng.standard_normal((30, 64)).astype(np.float32)
    x_hat, w_hat = (exact_values(quantize(a)) for a in (x, w))
    tokens, outputs = rng.random(50), rng.random(30)
    for error, factor in ((x - x_hat, w_hat), (x, w - w_hat)):
        for t, o in ((None, None), (tokens, outputs), (tokens, None), (None, outputs)):
            squared = (error @ factor.T) ** 2 * (1 if o is None else o) * (1 if t is None else t[:, None])
            # float32 sums of 50 and of 30 terms: at most 83 · 2⁻²⁴ of Σ |E|, cancelled to the sum of E
            energy = error_energy(error, factor, t, o)
            limit = 83 * 2.0**-24 * np.abs(error_energy(np.abs(error), np.abs(factor), t, o)).sum()
            assert abs(energy.sum() - squared.sum(axis=1).mean()) <= limit


def test_energy_refuses_what_does_not_fit():
    x, w = np.ones((3, 16)), np.ones((2, 16))
    for arguments, message in [
        ((x, w[:, :8]), "x has K=16 and w has K=8"),
        ((x, w, np.ones(1)), r"tokens has shape \(1,\) but a column of x has \(3,\)"),
        ((x, w, np.ones((3, 1))), r"tokens has shape \(3, 1\)"),
        ((x, w, None, np.ones(3)), r"outputs has shape \(3,\) but a column of w has \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            error_energy(*arguments)


def integer_energy(x, w):
    return error_energy(x, w) * len(x)  # no mean: every number in a plan is an integer, exact in float64


@st.composite
def sides(draw, blocks=3):
    """A channel order and an exact error energy of each side, in that order."""
    k = BLOCK * draw(st.integers(1, blocks))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    t, n = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    scale = rng.integers(0, 4, k)  # some channels without error
    energies = [
        integer_energy(rng.integers(-3, 4, (t, k)) * scale, rng.integers(-3, 4, (n, k))) for _ in "xw"
    ]
    return rng.permutation(k), *energies


def left_over(energy, order, repaired):
    """What is left of one side, from scratch."""
    left = ~np.isin(order, repaired)
    return energy[np.ix_(left, left)].sum()


@given(sides())
def test_gains_are_exact_decreases_and_never_negative(layer):
    order, activation, weight = layer
    made = plan(order, activation, weight)
    np.testing.assert_array_equal(made.order, order)
    assert made.energy == made.remaining[0] == activation.sum() + weight.sum()
    for n in range(len(made.steps) + 1):
        chosen = {side: [c for s in made.steps[:n] if s.side == side for c in s.channels] for side in SIDES}
        expected = left_over(activation, order, chosen["activation"]) + left_over(
            weight, order, chosen["weight"]
        )
        assert made.remaining[n] == expected
    assert all(step.gain > 0 for step in made.steps)
    assert made.remaining[-1] >= 0


SIDES = "activation", "weight"


@given(sides())
def test_each_step_is_the_best_offer(layer):
    """Of all blocks of activations that are left the one that removes most, by trying each; of the weights
    the 16 channels that remove most one by one; of these two the better. It ends where neither gains."""
    order, activation, weight = layer
    made = plan(order, activation, weight)
    repaired = {side: [] for side in SIDES}
    for step in [*made.steps, None]:
        before = left_over(activation, order, repaired["activation"])
        blocks = [b for b in order.reshape(-1, BLOCK) if b[0] not in repaired["activation"]]
        block_gains = [before - left_over(activation, order, [*repaired["activation"], *b]) for b in blocks]
        before = left_over(weight, order, repaired["weight"])
        alone = {
            c: before - left_over(weight, order, [*repaired["weight"], c])
            for c in order.tolist()
            if c not in repaired["weight"]
        }
        best = sorted(alone.values())[-BLOCK:]
        if step is None:
            assert all(gain <= 0 for gain in block_gains)
            break
        assert step.gain >= max(block_gains, default=0)
        if step.side == "activation":
            assert step.gain == max(block_gains)
            assert any(step.channels.tolist() == b.tolist() for b in blocks)
        else:
            assert sorted(alone[c] for c in step.channels.tolist()) == best
        repaired[step.side] += step.channels.tolist()


@given(sides())
def test_channels_whose_errors_do_not_meet_go_by_size(layer):
    """A diagonal energy: the 16 largest, then the next, from any place; then nothing is left."""
    order, _, weight = layer
    diagonal = np.diag(np.diagonal(weight))
    made = plan(order, np.zeros_like(weight), diagonal)
    gains = np.sort(np.diagonal(weight))[::-1].reshape(-1, BLOCK).sum(axis=1)
    assert [step.gain for step in made.steps] == gains[gains > 0].tolist()
    assert made.remaining[-1] == 0


@pytest.fixture
def side_of_pairs(monkeypatch):
    """One side of a plan with blocks of 2: all pairs of channels can be tried."""
    monkeypatch.setattr(planning, "BLOCK", 2)
    return planning._Side


@pytest.mark.parametrize("seed", range(20))
def test_the_best_pair_by_trying_all(side_of_pairs, seed):
    """Where no two errors meet it is the best of all 28 pairs; the best block is so with any errors."""
    rng = np.random.default_rng(seed)
    side = side_of_pairs(np.diag(rng.permutation(8) + 1.0))
    gain, positions = side.best_channels()
    assert (
        gain == side.gain(positions) == max(side.gain(np.array(pair)) for pair in combinations(range(8), 2))
    )
    x = rng.integers(-3, 4, (3, 8))
    side = side_of_pairs((x.T @ x).astype(np.float64))
    gain, positions = side.best_block()
    gains = [side.gain(np.array([i, i + 1])) for i in range(0, 8, 2)]
    assert gain == max(gains)
    assert gains[positions[0] // 2] == max(gains)


def test_a_best_pair_that_a_plan_does_not_see(side_of_pairs):
    """Channels 0 and 1 err alike, 4 together. Each alone removes 3 of it, more than 2 or 3, which err by
    2.25: both are chosen and remove 4, where 0 and 2 would remove 5.25. The stated gain is the true one."""
    x = np.array([[1.0, 1.0, 0, 0], [0, 0, 1.5, 0], [0, 0, 0, 1.5]])
    side = side_of_pairs(x.T @ x)
    gain, positions = side.best_channels()
    assert (gain, sorted(positions.tolist())) == (4.0, [0, 1])
    assert max(side.gain(np.array(pair)) for pair in combinations(range(4), 2)) == 5.25


def test_a_block_is_chosen_with_its_pairs(side_of_pairs):
    """As above, but of blocks: 0 and 1 remove 4, 2 and 3 remove 4.5, although one by one it is 6 and 4.5."""
    x = np.array([[1.0, 1.0, 0, 0], [0, 0, 1.5, 0], [0, 0, 0, 1.5]])
    gain, positions = side_of_pairs(x.T @ x).best_block()
    assert (gain, positions.tolist()) == (4.5, [2, 3])


def test_errors_that_cancel_end_a_plan_before_all_is_repaired():
    """Two blocks whose errors cancel: repairing one alone would make it worse."""
    x = np.repeat([[1.0, -1.0]], BLOCK, axis=1)
    energy = error_energy(x, np.ones((1, 2 * BLOCK)))
    made = plan(np.arange(2 * BLOCK), energy, np.zeros_like(energy))
    assert made.steps == []
    assert made.remaining.tolist() == [0.0]


@given(sides(), st.data())
def test_a_plan_repairs_what_its_selection_repairs(layer, data):
    order, activation, weight = layer
    made = plan(order, activation, weight)
    n = data.draw(st.integers(0, len(made.steps)))
    amax = np.arange(len(order), dtype=np.float32)
    selection = made.selection(n, amax)
    chosen = {side: [s.channels.tolist() for s in made.steps[:n] if s.side == side] for side in SIDES}
    assert selection.num_residual == BLOCK * len(chosen["activation"])
    last = selection.order[selection.K - selection.num_residual :].reshape(-1, BLOCK)
    assert last.tolist() == chosen["activation"][::-1]  # best last
    assert selection.weight_channels.reshape(-1, BLOCK).tolist() == chosen["weight"]
    blocks = selection.order.reshape(-1, BLOCK).tolist()
    assert sorted(blocks) == sorted(order.reshape(-1, BLOCK).tolist())  # the same blocks, so the same scales
    first = blocks[: len(blocks) - len(last)]
    assert first == [
        b for b in order.reshape(-1, BLOCK).tolist() if b in first
    ]  # the others keep their order
    np.testing.assert_array_equal(selection.channel_amax, amax)


def test_a_plan_of_a_real_shape_predicts_the_error_energy():
    """Two hundred channels, float energies: the plan ends with nothing left but float error, and its
    prediction of each side is what is left of x̂ and ŵ without the repaired channels' errors."""
    rng = np.random.default_rng(1)
    k = 208
    x = (rng.standard_normal((100, k)) * np.exp(rng.standard_normal(k))).astype(np.float32)
    w = rng.standard_normal((40, k)).astype(np.float32)
    order = np.argsort(calibrate([x]), kind="stable")
    x, w = x[:, order], w[:, order]
    x_hat, w_hat = (exact_values(quantize(a)) for a in (x, w))
    activation, weight = error_energy(x - x_hat, w_hat), error_energy(x, w - w_hat)
    made = plan(order, activation, weight)
    assert len(made.steps) == 2 * k // BLOCK
    # Sums of K² terms, and a difference for each step: at most K² + 2 K float64 roundings of Σ |E|
    limit = (k**2 + 2 * k) * 2.0**-53 * (np.abs(activation).sum() + np.abs(weight).sum())
    assert abs(made.remaining[-1]) <= limit
    assert (np.diff(made.remaining) < 0).all()
    for n in range(len(made.steps) + 1):
        expected = sum(
            left_over(energy, order, [c for s in made.steps[:n] if s.side == side for c in s.channels])
            for side, energy in zip(SIDES, (activation, weight))
        )
        assert abs(made.remaining[n] - expected) <= limit
    selection = made.selection(7, np.ones(k))
    original = np.argsort(order)
    a = augment_activations(x[:, original], selection, quantize(x).tensor_scale)
    b = augment_weights(w[:, original], selection)
    assert a.shape[1] == b.shape[1] == k + 7 * BLOCK


def test_a_plan_refuses_what_does_not_fit():
    order, energy = np.arange(32), np.zeros((32, 32))
    for arguments, error, message in [
        ((order, energy[:16], energy), ValueError, r"activation has shape \(16, 32\) but order × order"),
        ((order, energy, energy[:16, :16]), ValueError, r"weight has shape \(16, 16\)"),
        ((order[:31], energy, energy), ValueError, "K=31 must be a positive multiple of the block size 16"),
        ((order + 1, energy, energy), ValueError, "order is not a permutation"),
        ((order * 1.0, energy, energy), TypeError, "must be K integers"),
    ]:
        with pytest.raises(error, match=message):
            plan(*arguments)
    made = plan(order, np.eye(32), np.eye(32))
    assert len(made.steps) == 4
    for steps in (-1, 5, 1.0):
        with pytest.raises(
            ValueError, match=f"steps={steps} must be an integer from 0 to 4, the steps of this"
        ):
            made.selection(steps, np.ones(32))


def plan_of(gains, energy):
    """A plan with these gains; its channels do not matter to `share`."""
    steps = [Step(float(gain), "weight", np.arange(BLOCK)) for gain in gains]
    return Plan(order=np.arange(BLOCK), energy=float(energy), steps=steps)


@st.composite
def shares(draw):
    """Layers, each with one to three plans of whole gains in any order, whole costs, a budget."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        plans = []
        for _ in range(draw(st.integers(1, 3))):
            gains = draw(st.lists(st.integers(1, 20), max_size=3))
            plans.append(plan_of(gains, sum(gains) + draw(st.integers(0, 9))))
        layers.append(plans)
    costs = draw(st.lists(st.integers(1, 5), min_size=len(layers), max_size=len(layers)))
    return layers, costs, draw(st.integers(0, 40))


def spent(chosen, costs):
    return sum(steps * cost for (_, steps), cost in zip(chosen, costs))


def remains(chosen, layers):
    return sum(plans[of].remaining[steps] for (of, steps), plans in zip(chosen, layers))


def all_choices(layers):
    choices = [[(of, n) for of, p in enumerate(plans) for n in range(len(p.steps) + 1)] for plans in layers]
    return product(*choices)


@given(shares())
def test_no_choice_of_the_same_cost_or_less_leaves_less(layer):
    layers, costs, budget = layer
    chosen = share(layers, costs, budget)
    assert len(chosen) == len(layers)
    cost = spent(chosen, costs)
    assert cost <= budget
    assert remains(chosen, layers) == min(
        remains(c, layers) for c in all_choices(layers) if spent(c, costs) <= cost
    )


@given(shares())
def test_shares_get_better_with_the_budget_until_nothing_is_gained(layer):
    layers, costs, _ = layer
    most = spent([(0, max(len(p.steps) for p in plans)) for plans in layers], costs)
    chosen = [share(layers, costs, budget) for budget in (0, 0.5, *range(1, most + 1), 10**9, np.inf)]
    left, cost = [remains(c, layers) for c in chosen], [spent(c, costs) for c in chosen]
    assert (np.diff(left) <= 0).all()
    assert (np.diff(cost) >= 0).all()
    assert cost[0] == 0
    assert left[0] == sum(min(p.energy for p in plans) for plans in layers)
    assert left[-1] == sum(min(p.remaining[-1] for p in plans) for plans in layers)


@given(shares())
def test_a_share_is_the_best_that_a_price_can_say(layer):
    """Nothing between it and the budget is on the lower hull of all choices: else a lower price would do."""
    layers, costs, budget = layer
    cost = spent(share(layers, costs, budget), costs)
    least = {}
    for choice in all_choices(layers):
        c = spent(choice, costs)
        least[c] = min(least.get(c, np.inf), remains(choice, layers))
    useful = [b for b, left in least.items() if not any(a < b and least[a] <= left for a in least)]

    def above_chord(b, strictly):
        """Is b above, or also on, a line between two cheaper and dearer choices?"""
        lines = [(a, c) for a in least for c in least if a < b < c]
        gaps = [least[b] * (c - a) - least[a] * (c - b) - least[c] * (b - a) for a, c in lines]
        return any(gap > 0 or (gap == 0 and not strictly) for gap in gaps)

    assert cost in useful
    assert not above_chord(cost, strictly=True)
    assert cost >= max(b for b in useful if b <= budget and not above_chord(b, strictly=False))


def test_of_equal_plans_the_cheapest():
    """Both end at 3: the second without a column. Nothing is bought that gains nothing."""
    assert share([[plan_of([4], 7), plan_of([], 3)]], [1], 5) == [(1, 0)]


def test_costs_count():
    """The same gains, one layer twice as dear: the budget of one step goes to the cheap one."""
    layers = [[plan_of([4, 3], 7)], [plan_of([5, 3], 8)]]
    assert share(layers, [1, 2], 1) == [(0, 1), (0, 0)]
    assert share(layers, [2, 1], 1) == [(0, 0), (0, 1)]
    assert share(layers, [1, 2], 2) == [(0, 2), (0, 0)]
    assert share(layers, [1, 2], 6) == [(0, 2), (0, 2)]


def test_a_share_scales_with_energy_and_cost():
    layers = [[plan_of([4, 3], 7)], [plan_of([5, 3], 8)]]
    for scale in (1e-30, 1e30):
        scaled = [
            [plan_of(np.array([s.gain for s in p.steps]) * scale, p.energy * scale) for p in plans]
            for plans in layers
        ]
        for costs in ([1, 2], [0.001, 0.002], [10**6, 2 * 10**6]):
            assert share(scaled, costs, 3 * costs[0]) == share(layers, [1, 2], 3)


def test_equal_layers_buy_together_or_not_at_all():
    layers = [[plan_of([4], 4)], [plan_of([4], 4)]]
    assert share(layers, [1, 1], 1) == [(0, 0), (0, 0)]
    assert share(layers, [1, 1], 2) == [(0, 1), (0, 1)]


def test_a_share_refuses_what_it_cannot_count():
    layers = [[plan_of([4], 4)], [plan_of([4], 4)]]
    for budget in (-1, np.nan):
        with pytest.raises(
            ValueError, match=f"budget={budget} must not be negative; 0 means no extra columns"
        ):
            share(layers, [1, 1], budget)
    for costs in ([1], [1, 1, 1], [1, 0], [1, -2], [np.nan, 1]):
        with pytest.raises(ValueError, match=r"costs=\[.*\] must be 2 positive numbers"):
            share(layers, costs, 1)
