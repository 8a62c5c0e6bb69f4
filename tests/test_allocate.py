"""Bit allocation: against exhaustive search, the budget, overrides, refusals, and the files that show it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from halfturn.error import Error

from halfturn.converter.allocate import (  # isort: skip
    Matrix,
    allocate,
    feasible_range,
    pareto,
    parse_overrides,
    predicted_cost,
    table,
    uniform,
)

WIDTHS = range(2, 9)
SHAPES = (("q_proj", 64, 64), ("v_proj", 32, 64), ("up_proj", 176, 64), ("down_proj", 64, 172))


def model(layers: int, seed: int = 0, widths: range = WIDTHS) -> list[Matrix]:
    """Matrices of a small Llama's shapes whose costs fall about fourfold a bit."""
    chance = random.Random(seed)
    matrices = []
    for layer in range(layers):
        for name, out, columns in SHAPES:
            size = chance.lognormvariate(-5, 1.5)
            costs = {bits: size * 4.0 ** (2 - bits) * chance.uniform(0.8, 1.2) for bits in widths}
            matrices.append(Matrix(f"model.layers.{layer}.{name}", out, columns, costs))
    return matrices


def best_by_trying(matrices: list[Matrix], bpw: float) -> float:
    weights, least = sum(m.weights for m in matrices), math.inf
    for choice in itertools.product(*([(m.stored_bits(b), cost) for b, cost in m.costs.items()] for m in matrices)):
        if sum(bits for bits, _ in choice) <= bpw * weights:
            least = min(least, sum(cost for _, cost in choice))
    return least


def test_stored_bits_count_padding_scales_and_levels() -> None:
    matrix = Matrix("x", 20, 40, {4: 0.0}, groups=3)
    assert matrix.stored_bits(4) == 32 * 48 * 4 + 16 * 3 * 32 + 8 * 16
    assert dataclasses.replace(matrix, bias=True).stored_bits(4) == matrix.stored_bits(4) + 32 * 20
    assert matrix.weights == 800


@pytest.mark.parametrize("bpw", [2.4, 3.0, 3.71, 4.5])
def test_no_choice_is_better(bpw: float) -> None:
    matrices = model(2, seed=int(10 * bpw), widths=range(2, 6))
    chosen = allocate(matrices, bpw)
    assert chosen.bpw <= bpw
    assert chosen.cost == pytest.approx(best_by_trying(matrices, bpw), rel=1e-9)


@pytest.mark.parametrize("bpw", [2.3, 3.0, 4.0, 5.37, 7.9])
def test_the_budget_is_kept_and_used(bpw: float) -> None:
    matrices = model(12)
    for chosen in (allocate(matrices, bpw), uniform(matrices, bpw)):
        bits = sum(m.stored_bits(chosen.widths[m.name]) for m in matrices)
        assert chosen.bpw == pytest.approx(bits / sum(m.weights for m in matrices))
        assert bpw - 0.1 < chosen.bpw <= bpw
        assert chosen.cost == pytest.approx(sum(m.costs[chosen.widths[m.name]] for m in matrices))
    assert allocate(matrices, bpw).cost <= uniform(matrices, bpw).cost


def by_milp(matrices: list[Matrix], bpw: float) -> float:
    """The least cost by scipy's branch and bound."""
    optimize = pytest.importorskip("scipy.optimize")
    flat = [(row, m.stored_bits(w), m.costs[w]) for row, m in enumerate(matrices) for w in m.costs]
    budget = bpw * sum(m.weights for m in matrices)
    one_each = np.array([[float(row == wanted) for row, _, _ in flat] for wanted in range(len(matrices))])
    result = optimize.milp(
        np.array([1e4 * cost for _, _, cost in flat]),
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint([[bits / budget for _, bits, _ in flat]], -np.inf, 1),
        ],
        options={"mip_rel_gap": 1e-7},
    )
    return float(result.fun) / 1e4


@pytest.mark.parametrize(("seed", "bpw"), [(0, 2.3), (1, 3.1), (2, 4.0), (3, 5.2), (4, 7.7)])
def test_same_cost_as_branch_and_bound(seed: int, bpw: float) -> None:
    matrices = model(5, seed)
    assert allocate(matrices, bpw).cost == pytest.approx(by_milp(matrices, bpw), rel=1e-5)


def test_equal_matrices_and_costs_that_rise() -> None:
    same = {2: 1.0, 3: 0.3, 4: 0.4, 5: 0.05, 6: 0.05}
    matrices = [Matrix(str(i), 64, 64, same) for i in range(9)]
    for bpw in (2.3, 3.0, 3.7, 4.4, 5.5, 9.0):
        chosen = allocate(matrices, bpw)
        assert chosen.bpw <= bpw and 4 not in chosen.widths.values()
        few = matrices[:4]
        assert allocate(few, bpw).cost == pytest.approx(best_by_trying(few, bpw))
    assert allocate(matrices, 9.0).cost == pytest.approx(9 * 0.05)


def test_free_matrices() -> None:
    matrices = [Matrix(str(i), 64, 64, dict.fromkeys(WIDTHS, 0.0)) for i in range(5)]
    assert allocate(matrices, 4.0).cost == 0


def test_a_sensitive_matrix_gets_more_bits() -> None:
    costs = {bits: 4.0**-bits for bits in WIDTHS}
    matrices = [Matrix("a", 64, 64, costs), Matrix("b", 64, 64, {b: 256 * c for b, c in costs.items()})]
    assert allocate(matrices, 5.5).widths == {"a": 3, "b": 7}


def test_uniform_mixes_two_neighbouring_widths_evenly() -> None:
    matrices = [Matrix(f"model.layers.{i}.q_proj", 256, 256, {b: 1.0 for b in WIDTHS}) for i in range(32)]
    overhead = (16 * 256 + 8 * 16) / 256**2
    chosen = uniform(matrices, 4.5 + overhead + 0.01)
    widths = [chosen.widths[m.name] for m in matrices]
    assert sorted(set(widths)) == [4, 5] and abs(sum(w == 5 for w in widths) - 16) <= 1
    for start in range(0, 32, 8):
        assert abs(sum(w == 5 for w in widths[start : start + 8]) - 4) <= 1
    assert set(uniform(matrices, 4 + overhead).widths.values()) == {4}


def test_uniform_needs_no_costs() -> None:
    matrices = [Matrix(m.name, m.out, m.columns, dict.fromkeys(WIDTHS, math.nan)) for m in model(3)]
    assert uniform(matrices, 4.2).bpw <= 4.2


def test_targets_that_cannot_be_met_are_refused_with_the_range() -> None:
    matrices = model(3)
    least, most = feasible_range(matrices)
    for bad in (least - 0.01, 0.0, -1.0, math.nan, math.inf):
        for solve in (allocate, uniform):
            with pytest.raises(Error, match=rf"can't be met.*{math.ceil(least * 1000) / 1000:.3f} to "):
                solve(matrices, bad)
    assert set(allocate(matrices, least + 1e-9).widths.values()) == {2}
    assert set(allocate(matrices, most + 1).widths.values()) == {8}
    with pytest.raises(Error, match="no matrices"):
        allocate([], 4.0)


@pytest.mark.parametrize("bpw", [1e10, 1e308])
def test_more_bits_than_there_are_widths(bpw: float) -> None:
    matrices = model(3)
    for solve in (allocate, uniform):
        assert set(solve(matrices, bpw).widths.values()) == {8}


def test_costs_that_overflowed_are_refused() -> None:
    with pytest.raises(Error, match="a predicted cost of a isn't finite"):
        allocate([Matrix("a", 16, 16, {2: math.inf, 3: 1.0})], 6.0)


def test_fixed_widths_hold_and_count() -> None:
    matrices = model(6)
    names = [m.name for m in matrices]
    fixed = parse_overrides(["*.v_proj=8", "model.layers.0.*=6", "*.0.up_proj=2"], names)
    assert fixed["model.layers.1.v_proj"] == 8 and fixed["model.layers.0.v_proj"] == 6
    assert fixed["model.layers.0.up_proj"] == 2 and len(fixed) == 9
    for chosen in (allocate(matrices, 4.0, fixed), uniform(matrices, 4.0, fixed)):
        assert all(chosen.widths[name] == bits for name, bits in fixed.items()) and chosen.bpw <= 4.0
    with pytest.raises(Error, match=r"can't be met, with the widths that --bits fixes: choose from 8"):
        allocate(matrices, 4.0, dict.fromkeys(names, 8))
    with pytest.raises(Error, match="'nothing'"):
        allocate(matrices, 4.0, {"nothing": 4})


@pytest.mark.parametrize(
    "rule", ["q_proj", "=4", "*=", "*=9", "*=1", "*=4.5", "*=x", "*=²", "*=٤", f"*={'4' * 5000}", ""]
)
def test_malformed_overrides_are_refused(rule: str) -> None:
    with pytest.raises(Error, match="isn't PATTERN=N with N from 2 to 8"):
        parse_overrides([rule], ["model.layers.0.q_proj"])


def test_an_override_that_matches_nothing_is_refused() -> None:
    with pytest.raises(Error, match=r"\*\.v_prj=4' matches none of the 1 matrices.*layers.0.q_proj"):
        parse_overrides(["*.v_prj=4"], ["model.layers.0.q_proj"])


def test_predicted_cost_is_half_the_weighted_sum() -> None:
    torch = pytest.importorskip("torch")
    costs = predicted_cost(torch.tensor([1.0, 2.0]), {2: torch.tensor([4.0, 0.5]), 3: torch.tensor([1.0, 0.0])})
    assert costs == {2: 2.5, 3: 0.5}


def test_the_pareto_curve_falls_and_no_allocation_lies_below_it() -> None:
    matrices = model(8)
    curve = pareto(matrices, points=1000)
    assert curve[0][0] == pytest.approx(feasible_range(matrices)[0])
    assert curve[-1][0] == pytest.approx(feasible_range(matrices)[1])
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve))
    slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(curve)]
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(slopes))
    for bpw in (2.5, 3.3, 4.0, 6.1):
        chosen = allocate(matrices, bpw)
        (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(curve) if a[0] <= chosen.bpw <= b[0])
        bound = y0 + (y1 - y0) * (chosen.bpw - x0) / (x1 - x0)
        assert bound * (1 - 1e-9) <= chosen.cost < 1.2 * bound


def test_table_and_plot(tmp_path: Path) -> None:
    matrices = model(4)
    chosen = allocate(matrices, 4.0, {matrices[0].name: 5})
    written = json.loads(json.dumps(table(matrices, chosen, 4.0)))
    assert written["target_bpw"] == 4.0 and written["bpw"] == chosen.bpw and written["predicted_kl"] == chosen.cost
    first = written["matrices"][matrices[0].name]
    assert (
        first["bits"] == 5
        and first["fixed"]
        and first["shape"] == [64, 64]
        and first["options"].keys() == set("2345678")
    )
    assert len(written["pareto"]) > 5
    pytest.importorskip("matplotlib")
    from halfturn.converter.plot import plot_allocation

    free = [dataclasses.replace(matrix, costs=dict.fromkeys(WIDTHS, 0.0)) for matrix in matrices]
    for drawn in (matrices, free):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # zeros have no logarithm
            plot_allocation(tmp_path / "allocation.png", drawn, [allocate(drawn, 4.0), uniform(drawn, 4.0)])
        assert (tmp_path / "allocation.png").read_bytes().startswith(b"\x89PNG")
