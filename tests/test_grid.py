"""The grid codec: known answers of its tables, plateaus, zero error on its own grid, and its error paths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from halfturn.error import Error
from tiny_sources import torch

from halfturn.converter.codecs import grid  # isort: skip
from one_matrix import encode, rtn  # isort: skip
from halfturn.converter.gptq import quadratic_error, row_parts  # isort: skip

LLOYD_MAX = {2: 0.1175, 3: 0.0345, 4: 0.0095}
UNIFORM = {2: 0.1189, 3: 0.0374, 4: 0.0115}


def slow_gaussian_error(levels: np.ndarray, unit: float) -> float:
    """E[(x - nearest level)^2] for N(0, 1) by a plain sum over fine steps."""
    x = np.linspace(-9, 9, 200_001)
    nearest = np.abs(x[:, None] - (levels * unit)[None, :]).min(1) if len(levels) <= 16 else None
    if nearest is None:
        values = np.sort(levels * unit)
        nearest = np.abs(x - values[np.searchsorted((values[1:] + values[:-1]) / 2, x)])
    return float((nearest**2 * np.exp(-x * x / 2)).sum() / np.exp(-x * x / 2).sum())


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_known_errors_of_the_gaussian_tables(bits: int) -> None:
    assert grid.gaussian_mse(bits) == pytest.approx(LLOYD_MAX[bits], rel=0.01)
    assert grid.gaussian_mse(bits) == pytest.approx(
        slow_gaussian_error(grid.gaussian_levels(bits).astype(np.float64), grid.gaussian_unit(bits)), rel=1e-4
    )


@pytest.mark.parametrize("bits", UNIFORM)
def test_known_errors_of_uniform_tables(bits: int) -> None:
    levels = np.arange(1 - 2**bits, 2**bits, 2)
    best = min(grid.gaussian_error(levels, unit) for unit in np.linspace(0.1, 0.6, 251))
    assert best == pytest.approx(UNIFORM[bits], rel=0.01)


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_tables_fit_the_format(bits: int) -> None:
    levels = grid.gaussian_levels(bits).astype(int)
    assert levels.shape == (2**bits,) and levels.min() >= -127 and levels.max() <= 127
    steps = np.diff(levels)
    assert (steps[:-1] > 0).all() and (steps[-1] > 0 or bits == 8)
    values = np.unique(levels)
    np.testing.assert_array_equal(values, -values[::-1])


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_no_single_level_can_be_moved_to_a_better_place(bits: int) -> None:
    levels, unit = grid.gaussian_levels(bits).astype(int), grid.gaussian_unit(bits)
    best = grid.gaussian_error(levels, unit)
    for i in range(len(levels)):
        for step in (-1, 1):
            moved = levels.copy()
            moved[i] += step
            moved[len(levels) - 1 - i] -= step
            if len(np.unique(moved)) == len(levels) and np.abs(moved).max() <= 127:
                assert grid.gaussian_error(moved, unit) > best * (1 - 1e-6)


def test_more_bits_are_better() -> None:
    errors = [grid.gaussian_mse(bits) for bits in grid.WIDTHS]
    assert all(wide < 0.6 * narrow for narrow, wide in pairwise(errors))
    assert grid.gaussian_mse(8) < 1e-4


def test_unsupported_width_is_refused() -> None:
    with pytest.raises(Error, match=r"grid of 9 bits.*2 to 8"):
        grid.gaussian_levels(9)


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_lookup_is_the_nearest_level(bits: int) -> None:
    levels = np.unique(grid.gaussian_levels(bits).astype(np.float64))
    x = torch.from_numpy(np.random.default_rng(bits).uniform(-140, 140, 4000).astype(np.float32))
    got = grid.round_to_nearest(
        x[:, None], torch.ones(1, 1), grid.lookup_table(bits), torch.zeros(1, dtype=torch.int32)
    )
    wanted = np.abs(x.double().numpy()[:, None] - levels[None]).min(1)
    np.testing.assert_allclose(np.abs(x.double().numpy() - got[:, 0].double().numpy()), wanted)


@pytest.mark.parametrize("bits", grid.WIDTHS)
@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_weights_on_the_grid_come_back_exactly(bits: int, rounding: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    used = np.unique(grid.gaussian_levels(bits))
    levels = torch.from_numpy(used)[torch.randint(len(used), (24, 512), generator=generator)].float()
    levels[:, 0], levels[:, 1] = used.max(), used.min()
    scales = torch.rand(24, generator=generator).add_(0.01).half().float()
    states = torch.randn(2048, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    encoded = encode(levels * scales[:, None], states.T @ states, bits, rounding=rounding)
    torch.testing.assert_close(grid.decode(encoded), levels * scales[:, None], rtol=1e-3, atol=0)


def test_sixteen_plateaus_give_sixteen_clusters() -> None:
    values = torch.from_numpy(grid.gaussian_levels(4)).float() * 0.125
    weight = values.repeat_interleave(16).repeat(4, 1)
    encoded = rtn(weight, 4)
    for plateau in encoded.codes.view(4, 16, 16):
        assert (plateau == plateau[:, :1]).all() and len(plateau[:, 0].unique()) == 16
    torch.testing.assert_close(grid.decode(encoded), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gaussian_rows_reach_the_tables_error(bits: int) -> None:
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)) * 0.03
    error = (grid.decode(rtn(weight, bits)) - weight).square().mean() / weight.square().mean()
    # A row of 2048 has no values far out, so that 8 bits can do with a smaller scale than a true Gaussian's.
    assert (0.6 if bits == 8 else 0.98) < float(error) / grid.gaussian_mse(bits) < 1.02


def test_encoded_parts_have_the_formats_types() -> None:
    encoded = encode(torch.randn(40, 96), torch.eye(96), 3, group_size=32)
    assert encoded.codes.dtype == torch.uint8 and encoded.codes.shape == (40, 96) and int(encoded.codes.max()) < 8
    assert encoded.scales.dtype == torch.float16 and encoded.scales.shape == (3, 40)
    assert encoded.levels.dtype == torch.int8 and encoded.levels.shape == (8,) and encoded.bits == 3


def test_decode_is_levels_times_scales() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 1.0], [2.0, 4.0]], dtype=torch.float16)
    levels = torch.tensor([-100, -30, 30, 100], dtype=torch.int8)
    wanted = torch.tensor([[-50.0, -15, 60, 200], [100, 100, -400, -400]])
    assert torch.equal(grid.decode(grid.GridTensors(codes, scales, levels)), wanted)


def test_groups_follow_the_weights_size() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 32:] *= 1000
    whole, split = rtn(weight, 4), rtn(weight, 4, group_size=32)
    small = (grid.decode(split) - weight)[:, :32].square().mean() / weight[:, :32].square().mean()
    assert float(small) < 0.02 < float((grid.decode(whole) - weight)[:, :32].square().mean())


def test_zero_rows_and_tiny_weights() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    weight[1], weight[3] = 0, weight[3] * 1e-10
    for encoded in (encode(weight, torch.eye(64), 4), rtn(weight, 8)):
        decoded = grid.decode(encoded)
        assert torch.isfinite(decoded).all() and float(encoded.scales[0, 1]) == 0
        assert not decoded[1].any() and float(decoded[3].abs().max()) < 4e-6


def test_subnormal_scales_still_round_to_the_nearest_level() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(3)) * 2e-5
    error = (grid.decode(rtn(weight, 4)) - weight).square().mean() / weight.square().mean()
    assert float(error) < 2 * grid.gaussian_mse(4)


def test_damaged_weights_are_refused_by_name() -> None:
    weight = torch.ones(4, 32)
    with pytest.raises(Error, match=r"model\.up_proj needs a scale of 9"):
        rtn(weight * 1e8, 4, name="model.up_proj")
    weight[2, 3] = float("nan")
    with pytest.raises(Error, match=r"model\.up_proj has NaN or infinite weights"):
        encode(weight, torch.eye(32), 4, name="model.up_proj")
    with pytest.raises(Error, match=r"shape \[32\]"):
        rtn(torch.ones(32), 4)


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_matrix_that_overflows_is_blamed_and_not_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    """Also where a scale grows too large only when it is fitted again."""
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(16, 32, generator=generator) for _ in range(3)]
    parts = row_parts(torch.eye(8).repeat(4, 1, 1), 1) if in_parts else []  # of the first two
    names = ["layers.0.q", "layers.0.k", "layers.0.v"]
    for wrong, name in ((20, "k"), (40, "v")):
        scales = torch.ones(48)
        scales[wrong] = 1e5
        monkeypatch.setattr(grid, "refit", lambda *_, scales=scales: scales)
        with pytest.raises(Error, match=rf"^layers\.0\.{name} needs a scale of 1e\+05, above"):
            grid.encode_group(weights, torch.eye(32), [4, 4, 4], parts=parts, names=names)


def test_wrong_settings_are_refused() -> None:
    weight = torch.ones(4, 96)
    for size in (10, 0, -16, 64):
        with pytest.raises(Error, match=f"group size {size} doesn't divide 96"):
            rtn(weight, 4, group_size=size)
    with pytest.raises(Error, match="has 96 inputs, its Hessian has 32"):
        encode(weight, torch.eye(32), 4)
    with pytest.raises(Error, match=r"'best'.*gptq or rtn"):
        encode(weight, torch.eye(96), 4, rounding="best")


def test_a_run_of_several_matrices_equals_runs_of_one() -> None:
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(500, 64, generator=generator)
    hessian = states.T @ states / 500
    weights = [torch.randn(rows, 64, generator=generator) for rows in (16, 5, 33)]
    together = grid.encode_group(weights, hessian, [4, 2, 4])
    for weight, bits, encoded in zip(weights, (4, 2, 4), together):
        alone = encode(weight, hessian, bits)
        assert encoded.bits == bits and encoded.codes.shape == weight.shape
        same = (encoded.codes == alone.codes).float().mean()
        assert float(same) > 0.99  # sums of another length may round a tie the other way
        torch.testing.assert_close(encoded.scales, alone.scales, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_option_errors_are_those_of_encode(rounding: str) -> None:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(800, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    hessian, weight = states.T @ states / 800, torch.randn(20, 48, generator=generator)
    errors = grid.option_errors(weight, hessian, (2, 4, 8), rounding=rounding)
    assert list(errors) == [2, 4, 8]
    for bits, error in errors.items():
        decoded = grid.decode(encode(weight, hessian, bits, rounding=rounding, sweeps=0))
        wanted = ((states @ (decoded - weight).T).square().sum(0)) / 800
        torch.testing.assert_close(error, wanted, rtol=0.02, atol=1e-4)
        torch.testing.assert_close(error, quadratic_error(decoded - weight, hessian), rtol=0.02, atol=1e-4)
