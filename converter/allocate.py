"""Where the bits go: an exact solver spends a bit budget over matrices, each at its own width.

The predicted cost of a matrix at a width, in nats of KL divergence a token, is 1/2 * sum over outputs o of
S_o * err_o(width): S_o is the mean square of the gradient of log p(y) at output o (y drawn from the model itself),
err_o is D_o H D_o^T of the rounded weight. Costs of different matrices add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from halfturn.converter.write import LinearPlan
from halfturn.error import Error


@dataclass(frozen=True)
class Matrix:
    """One linear and its options. out, columns: unpadded shape; costs: predicted KL a token by width, the choices."""

    name: str
    out: int
    columns: int
    costs: Mapping[int, float]
    groups: int = 1
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.out * self.columns

    def stored_bits(self, width: int) -> int:
        """Bits in the file: codes of padded tiles, scales, levels and a bias."""
        return 8 * LinearPlan(self.out, self.columns, width, self.groups, self.bias).bytes


@dataclass(frozen=True)
class Allocation:
    """widths: bits by matrix name; bpw: stored bits per weight; cost: predicted KL a token."""

    widths: dict[str, int]
    bpw: float
    cost: float
    method: str
    fixed: dict[str, int] = field(default_factory=dict)


def predicted_cost(sensitivity: Any, errors: Mapping[int, Any]) -> dict[int, float]:
    """1/2 sum_o S_o err_o for every width: sensitivity and each of errors are tensors [out]."""
    return {width: 0.5 * float((sensitivity.double() * error.double()).sum()) for width, error in errors.items()}


def parse_overrides(rules: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Widths by matrix name from rules 'PATTERN=N' (fnmatch on the whole name); later rules win."""
    fixed: dict[str, int] = {}
    for rule in rules:
        pattern, separator, number = rule.rpartition("=")
        if not separator or not pattern or len(number) != 1 or number not in "2345678":
            raise Error(f"--bits {rule!r} isn't PATTERN=N with N from 2 to 8, as in '*.v_proj=6'")
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise Error(f"--bits {rule!r} matches none of the {len(names)} matrices, which look like {names[0]!r}")
        fixed.update(dict.fromkeys(matched, int(number)))
    return fixed


def _options(matrices: Sequence[Matrix], fixed: Mapping[str, int]) -> list[list[int]]:
    unknown = set(fixed) - {matrix.name for matrix in matrices}
    if unknown:
        raise Error(f"a width is fixed for {sorted(unknown)[0]!r}, which isn't one of the {len(matrices)} matrices")
    return [[fixed[m.name]] if m.name in fixed else sorted(m.costs) for m in matrices]


def _measure(
    matrices: Sequence[Matrix], widths: Mapping[str, int], fixed: Mapping[str, int], method: str
) -> Allocation:
    bits = sum(m.stored_bits(widths[m.name]) for m in matrices)
    weights = sum(m.weights for m in matrices)
    cost = sum(m.costs.get(widths[m.name], math.nan) for m in matrices)
    return Allocation(dict(widths), bits / weights, cost, method, dict(fixed))


def feasible_range(matrices: Sequence[Matrix], fixed: Mapping[str, int] | None = None) -> tuple[float, float]:
    """The least and the most bits per weight, overhead included, that the matrices can take."""
    options = _options(matrices, fixed or {})
    weights = sum(m.weights for m in matrices)
    least = sum(m.stored_bits(o[0]) for m, o in zip(matrices, options)) / weights
    most = sum(m.stored_bits(o[-1]) for m, o in zip(matrices, options)) / weights
    return least, most


def _budget(matrices: Sequence[Matrix], bpw: float, fixed: Mapping[str, int]) -> float:
    if not matrices:
        raise Error("there are no matrices to give bits to")
    least, most = feasible_range(matrices, fixed)
    if not math.isfinite(bpw) or bpw < least:
        low, high = math.ceil(least * 1000) / 1000, math.ceil(most * 1000) / 1000
        why = ", with the widths that --bits fixes" if fixed else ""
        raise Error(f"{bpw:g} bits per weight can't be met{why}: choose from {low:.3f} to {high:.3f}, scales included")
    return min(bpw, most) * sum(m.weights for m in matrices) * (1 + 1e-12)


def allocate(matrices: Sequence[Matrix], bpw: float, fixed: Mapping[str, int] | None = None) -> Allocation:
    """The widths of least total cost within bpw stored bits per weight; some widths can be fixed by name.

    Exact. Raises Error with the feasible range for a target that can't be met.
    """
    fixed = dict(fixed or {})
    budget = _budget(matrices, bpw, fixed)
    options = _options(matrices, fixed)
    choices = [[(m.stored_bits(w), m.costs.get(w, 0.0)) for w in widths] for m, widths in zip(matrices, options)]
    for matrix, choice in zip(matrices, choices):
        if not all(math.isfinite(cost) for _, cost in choice):
            raise Error(f"a predicted cost of {matrix.name} isn't finite: the calibration moments overflowed")
    picked = _cheapest(choices, int(budget))
    widths = {m.name: allowed[index] for m, allowed, index in zip(matrices, options, picked)}
    return _measure(matrices, widths, fixed, "allocated")


Choice = Sequence[tuple[int, float]]  # one matrix's (bits, cost), by rising width


def _cheapest(choices: Sequence[Choice], budget: int) -> list[int]:
    """The index into each choice that minimises total cost within a budget of bits that the narrowest ones keep.

    A multiple-choice knapsack, solved as Pisinger's mcknap does. At the price of a bit where the convex hull meets the
    budget, every option has a surplus over its matrix's best; surpluses and unspent bits together are what a solution
    costs above the convex bound. So whatever alone exceeds the greedy solution's excess is dropped, which leaves few
    partial sums. (scipy's milp finds the same widths, but in 1 to 30 s or, at its time limit, not quite: this takes
    0.03 s for the 210 matrices of SmolLM2.)
    """
    import numpy as np

    hulls = [_lower_hull(choice) for choice in choices]
    steps = sorted(
        ((a[1] - b[1]) / (b[0] - a[0]), -row, -number, b[0] - a[0])
        for row, hull in enumerate(hulls)
        for number, (a, b) in enumerate(pairwise(hull))
    )
    spent, price, reached = sum(hull[0][0] for hull in hulls), 0.0, [0] * len(hulls)
    for slope, row, number, more in reversed(steps):  # the steepest first; a matrix's own steps are in order
        if reached[-row] == -number and spent + more <= budget:
            spent, reached[-row] = spent + more, 1 - number
        else:
            price = max(price, slope)
    bits = [np.array([b for b, _ in choice], dtype=np.int64) for choice in choices]
    surplus = [np.array([cost + price * b for b, cost in choice]) for choice in choices]
    surplus = [s - s.min() for s in surplus]
    greedy = [list(choice).index(hull[k]) for choice, hull, k in zip(choices, hulls, reached)]
    excess = sum(float(s[i]) for s, i in zip(surplus, greedy)) + price * (budget - spent)
    excess *= 1 + 1e-9  # the greedy solution itself must survive rounding
    kept = [np.nonzero(s <= excess)[0] for s in surplus]
    order = sorted(range(len(choices)), key=lambda row: (len(kept[row]) > 1, -int(np.ptp(bits[row][kept[row]]))))
    least = sum(int(bits[row][k].min()) for row, k in enumerate(kept))
    most = sum(int(bits[row][k].max()) for row, k in enumerate(kept))

    used, over, trail = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for row in order:
        k = kept[row]
        least, most = least - int(bits[row][k].min()), most - int(bits[row][k].max())
        used, over = (used[:, None] + bits[row][k]).ravel(), (over[:, None] + surplus[row][k]).ravel()
        unspent = np.maximum(budget - used - most, 0)
        alive = np.nonzero((used + least <= budget) & (over + price * unspent <= excess))[0]
        alive = alive[np.lexsort((over[alive], used[alive]))]
        cost = over[alive] - price * used[alive]
        cheaper = np.append(True, cost[1:] < np.minimum.accumulate(cost)[:-1])  # than all that take fewer bits
        alive = alive[cheaper]
        used, over = used[alive], over[alive]
        trail.append((row, alive))
    at, picked = int(np.argmin(over + price * (budget - used))), [0] * len(choices)
    for row, alive in reversed(trail):
        at, option = divmod(int(alive[at]), len(kept[row]))
        picked[row] = int(kept[row][option])
    return picked


def _fair_order(count: int) -> list[int]:
    """0..count-1 so that every prefix is spread evenly (bit reversal)."""
    bits = max(1, (count - 1).bit_length())
    return [r for r in (int(format(i, f"0{bits}b")[::-1], 2) for i in range(2**bits)) if r < count]


def uniform(matrices: Sequence[Matrix], bpw: float, fixed: Mapping[str, int] | None = None) -> Allocation:
    """The same target, costs ignored: one width everywhere, the next one for an even spread of matrices."""
    fixed = dict(fixed or {})
    budget = _budget(matrices, bpw, fixed)
    options = _options(matrices, fixed)
    widths = {m.name: o[0] for m, o in zip(matrices, options)}
    spent = sum(m.stored_bits(widths[m.name]) for m in matrices)
    for level in range(max(o[-1] for o in options)):
        for index in _fair_order(len(matrices)):
            matrix, allowed = matrices[index], options[index]
            wider = [w for w in allowed if w > widths[matrix.name]]
            if not wider or widths[matrix.name] > level:
                continue
            more = matrix.stored_bits(wider[0]) - matrix.stored_bits(widths[matrix.name])
            if spent + more <= budget:
                widths[matrix.name] = wider[0]
                spent += more
    return _measure(matrices, widths, fixed, "uniform")


def pareto(
    matrices: Sequence[Matrix], fixed: Mapping[str, int] | None = None, points: int = 25
) -> list[tuple[float, float]]:
    """(bits per weight, total predicted cost) along the lower convex hull: what each further bit buys."""
    options = _options(matrices, fixed or {})
    least, most = feasible_range(matrices, fixed)
    weights = sum(m.weights for m in matrices)
    steps = []
    for matrix, widths in zip(matrices, options):
        hull = _lower_hull([(matrix.stored_bits(w), matrix.costs.get(w, 0.0)) for w in widths])
        steps += [((a[1] - b[1]) / (b[0] - a[0]), b[0] - a[0], a[1] - b[1]) for a, b in pairwise(hull)]
    cost = sum(m.costs.get(o[0], 0.0) for m, o in zip(matrices, options))
    bits = least * weights
    curve = [(least, cost)]
    for _, more, saved in sorted(steps, reverse=True):
        bits, cost = bits + more, cost - saved
        curve.append((bits / weights, cost))
    spacing = (most - least) / max(points - 1, 1)
    kept = [curve[0]]
    for point in curve[1:]:
        if point[0] - kept[-1][0] >= spacing or point is curve[-1]:
            kept.append(point)
    return kept


def _lower_hull(points: Choice) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for point in points:
        while (
            hull
            and point[1] < hull[-1][1]
            and (
                len(hull) > 1
                and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-1][0])
                >= (point[1] - hull[-1][1]) * (hull[-1][0] - hull[-2][0])
            )
        ):
            hull.pop()
        if not hull or point[1] < hull[-1][1]:
            hull.append(point)
    return hull


def table(matrices: Sequence[Matrix], chosen: Allocation, target: float) -> dict[str, Any]:
    """The content of allocation.json."""
    return {
        "target_bpw": target,
        "bpw": chosen.bpw,
        "method": chosen.method,
        "predicted_kl": chosen.cost,
        "matrices": {
            m.name: {
                "bits": chosen.widths[m.name],
                "shape": [m.out, m.columns],
                "fixed": m.name in chosen.fixed,
                "predicted_kl": m.costs.get(chosen.widths[m.name]),
                "options": {str(width): m.costs[width] for width in sorted(m.costs)},
            }
            for m in matrices
        },
        "pareto": [{"bpw": bits, "predicted_kl": cost} for bits, cost in pareto(matrices, chosen.fixed)],
    }
