"""The grid codec: weight[out, in] = levels[code[out, in]] * scales[group(in), out].

Levels are int8, stored in the file, and by default the best int8 table for a Gaussian: a rotated row is close to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from halfturn.converter.gptq import (
    DAMPING,
    STEPS,
    Factor,
    Part,
    correct,
    descend,
    factorize,
    quadratic_error,
    refit,
    round_to_nearest,
    round_with_feedback,
)
from halfturn.error import Error

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
SWEEPS = 2  # one lowers the loss of SmolLM2 at 4 bits by 3.8%, two by 5.0%, four by 5.9%
LARGEST = 127  # -128 has no negative in int8, and the int8 kernels take absolute values
HALF_MAX = 65504.0


@dataclass(frozen=True)
class GridTensors:
    """One encoded matrix. codes: uint8 [out, in]; scales: float16 [groups, out]; levels: int8 [2^bits]."""

    codes: Tensor
    scales: Tensor
    levels: Tensor

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1


# --- levels -----------------------------------------------------------------------------------------------------------


def _tail_moments(x: np.ndarray) -> np.ndarray:
    """Integrals of 1, t, t^2 times the normal density from x to infinity: [3, *x.shape]."""
    from scipy.special import ndtr

    density = np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
    return np.stack([ndtr(-x), density, x * density + ndtr(-x)])


def _cell(low: np.ndarray, high: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Integral of (t - level)^2 times the normal density from low to high."""
    mass, first, second = _tail_moments(low) - _tail_moments(high)
    return second - 2 * level * first + level * level * mass


def gaussian_error(levels: np.ndarray, unit: float) -> float:
    """Mean squared error on N(0, 1) of rounding to the nearest of levels * unit."""
    values = np.unique(levels).astype(np.float64) * unit
    edges = np.concatenate([[-40.0], (values[1:] + values[:-1]) / 2, [40.0]])
    return float(_cell(edges[:-1], edges[1:], values).sum())


def _best_symmetric(pairs: int, unit: float) -> tuple[float, list[int]]:
    """The `pairs` positive integers up to 127 which, with their negatives and times unit, round N(0, 1) best.

    Exact: the error is a sum over neighbouring levels, so the best table is a shortest path of `pairs` steps.
    """
    value = np.arange(1, LARGEST + 1) * unit
    low, high = value[:, None], value[None, :]
    middle = (low + high) / 2
    step = np.where(low < high, _cell(low, middle, low) + _cell(middle, high, high), np.inf)
    cost = _cell(np.zeros_like(value), value, value)
    came_from = []
    for _ in range(pairs - 1):
        total = cost[:, None] + step
        came_from.append(total.argmin(0))
        cost = total.min(0)
    cost = cost + _cell(value, np.full_like(value, 40.0), value)
    last = int(cost.argmin())
    path = [last]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return 2 * float(cost[last]), [level + 1 for level in reversed(path)]


@cache
def _gaussian_table(bits: int) -> tuple[tuple[int, ...], float]:
    from scipy.optimize import minimize_scalar

    if bits not in WIDTHS:
        raise Error(f"a grid of {bits} bits was asked for, the codec has widths 2 to 8")
    if bits == 8:
        levels = (*range(-LARGEST, LARGEST + 1), LARGEST)
    else:
        pairs = 2 ** (bits - 1)
        # The largest level of the unrounded table is near the 3x wider normal's quantile (Panter and Dite).
        from scipy.special import ndtri

        reach = 3**0.5 * float(ndtri(1 - 0.5 / 2**bits))
        units = reach / LARGEST * np.linspace(0.8, 1.3, 41)
        _, half = min(_best_symmetric(pairs, float(unit)) for unit in units)
        levels = tuple(-level for level in reversed(half)) + tuple(half)
    table = np.array(levels)
    found = minimize_scalar(
        lambda unit: gaussian_error(table, unit),
        bounds=(0.8 / LARGEST, 8 / LARGEST),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return levels, float(found.x)


def gaussian_levels(bits: int) -> np.ndarray:
    """The int8 levels [2^bits] that round a Gaussian best; 8 bits: -127..127 and 127 once more (255 integers fit)."""
    return np.array(_gaussian_table(bits)[0], dtype=np.int8)


def gaussian_unit(bits: int) -> float:
    """The best scale of gaussian_levels(bits) for N(0, 1)."""
    return _gaussian_table(bits)[1]


@cache
def gaussian_mse(bits: int) -> float:
    """Mean squared error of gaussian_levels(bits) on N(0, 1)."""
    return gaussian_error(gaussian_levels(bits), gaussian_unit(bits))


@cache
def lookup_table(bits: int) -> Tensor:
    """The nearest level for every half unit [n/2, (n+1)/2), n = -256..255: float32 [512].

    Exact, because integers' midpoints are multiples of a half.
    """
    levels = np.unique(gaussian_levels(bits)).astype(np.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    where = np.arange(-STEPS // 2, STEPS // 2) / 2
    return torch.tensor(levels[np.searchsorted(middles, where, side="right")], dtype=torch.float32)


# --- scales -----------------------------------------------------------------------------------------------------------


def _half(scales: Tensor, owners: Sequence[str]) -> Tensor:
    """Scales [groups, rows] as they'll be stored, in half. One below 3e-8 becomes zero, which changes its weights by
    under 4e-6. owners: the matrix of each row."""
    largest, row = scales.amax(0).max(0) if scales.numel() else (scales.new_zeros(()), 0)
    if largest > HALF_MAX:
        raise Error(
            f"{owners[int(row)]} needs a scale of {float(largest):.4g}, above half precision's 65504: its weights are "
            "too large"
        )
    return scales.half()


def search_scales(weight: Tensor, bits: int, rounds: int = 3) -> Tensor:
    """The scale [rows] of least squared rounding error for each row of weight [rows, in].

    Lloyd's iteration from the best of some starts: the row as a Gaussian, flatter, more peaked, or spread over all
    levels. Weighting columns by the Hessian gave nothing; trying five scales a row under error feedback lowers the
    loss by 3-4% for five times the rounding, and is left out.
    """
    columns, lookup, begins = weight.T.contiguous(), lookup_table(bits), torch.zeros(len(weight), dtype=torch.int32)
    gaussian = weight.square().mean(1).sqrt() * gaussian_unit(bits)
    full = weight.abs().amax(1) / float(gaussian_levels(bits).max())
    best, least = gaussian, torch.full((len(weight),), torch.inf)
    for scale, gain in ((gaussian, 1.0), (0.75 * gaussian, 0.9), (1.25 * gaussian, 0.9), (full, 0.9)):
        levels = round_to_nearest(columns, scale[None], lookup, begins)
        error = torch.addcmul(columns, levels, scale[None], value=-1).square_().sum(0)
        better = error < gain * least  # a later start only for a clear gain: near the first the iteration is quick
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    for _ in range(rounds):
        levels = round_to_nearest(columns, best[None], lookup, begins)
        norm = levels.square().sum(0)
        best = torch.where(norm > 0, (levels * columns).sum(0) / norm, 0)
    return best


# --- encode and decode ------------------------------------------------------------------------------------------------


def _groups(columns: int, group_size: int | None) -> int:
    if group_size is None:
        return 1
    if group_size <= 0 or group_size % 16 or columns % group_size:
        raise Error(f"group size {group_size} doesn't divide {columns} inputs in multiples of 16")
    return columns // group_size


def _check(weight: Tensor, name: str) -> Tensor:
    if weight.ndim != 2:
        raise Error(f"{name} has shape {list(weight.shape)}, a linear's weight is [out, in]")
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise Error(f"{name} has NaN or infinite weights: the source checkpoint is damaged")
    return weight


def _codes(levels: Tensor, bits: int) -> Tensor:
    """Level values (float32) to codes (uint8) of the same shape."""
    table = gaussian_levels(bits).astype(np.int64)
    code = torch.zeros(2 * LARGEST + 1, dtype=torch.uint8)
    for index in reversed(range(len(table))):
        code[table[index] + LARGEST] = index
    return code[levels.to(torch.int64) + LARGEST]


def encode_group(
    weights: Sequence[Tensor],
    hessian: Tensor | Factor | None,
    bits: Sequence[int],
    *,
    pulls: Sequence[Tensor] | None = None,
    parts: Sequence[Part] = (),
    rounding: str = "gptq",
    group_size: int | None = None,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    names: Sequence[str] | None = None,
) -> list[GridTensors]:
    """Encodes matrices [out_i, in] that read the same input, each at its own width, in one run.

    hessian: [in, in] mean of x x^T over tokens, or its Factor; without one, or with rounding "rtn", weights are rounded
    to nearest. pulls: [sum of out_i, in] each, what products lack (see gptq.correct). parts: of the first rows, in the
    order in which they are rounded (see gptq.row_parts). group_size: inputs that share a scale, a multiple of 16
    (default: the whole row). sweeps: of coordinate descent after rounding. Raises Error.
    """
    if rounding not in ("gptq", "rtn"):
        raise Error(f"rounding is {rounding!r}, it can be gptq or rtn")
    names = [f"matrix {i}" for i in range(len(weights))] if names is None else names
    checked = [_check(weight, name) for weight, name in zip(weights, names)]
    columns = checked[0].shape[1]
    groups = _groups(columns, group_size)
    factor = None
    if rounding == "gptq" and hessian is not None:
        factor = hessian if isinstance(hessian, Factor) else factorize(hessian, damping, names[0])
        if len(factor.diagonal) != columns:
            raise Error(f"{names[0]} has {columns} inputs, its Hessian has {len(factor.diagonal)}")
        if pulls is not None:
            rows = [len(weight) for weight in checked]
            checked = list(correct(torch.cat(checked), factor, pulls).split(rows))
    scales = torch.cat([_row_scales(*each, groups) for each in zip(checked, bits, names)], 1)
    tables = sorted(set(bits))
    lookup = torch.cat([lookup_table(width) for width in tables])
    begins = torch.cat(
        [torch.full((len(w),), tables.index(b) * STEPS, dtype=torch.int32) for w, b in zip(checked, bits)]
    )
    target = torch.cat(checked).T.contiguous()
    owners = [name for weight, name in zip(checked, names) for _ in range(len(weight))]

    if factor is None:
        levels = round_to_nearest(target, _spread(scales, columns), lookup, begins)
    elif not parts:
        levels, scales = _round_rows(target, scales, lookup, begins, factor, sweeps, owners)
    else:
        levels, error = torch.empty_like(target), torch.empty_like(target)
        others = torch.arange(sum(len(part.rows) for part in parts), len(begins))  # of no part: with the first
        for part in parts:
            which = torch.cat([part.rows, others])
            wanted = torch.cat([part.target(target, error), target[:, others]], 1)
            levels[:, which], scales[:, which] = _round_rows(
                wanted, scales[:, which], lookup, begins[which], factor, sweeps, [owners[row] for row in which.tolist()]
            )
            error[:, which] = target[:, which] - levels[:, which] * _spread(scales[:, which], columns)
            others = others[:0]
    rows = [len(weight) for weight in checked]
    return [
        GridTensors(_codes(part.T, width).contiguous(), half.contiguous(), torch.tensor(gaussian_levels(width)))
        for part, width, half in zip(levels.split(rows, 1), bits, scales.split(rows, 1))
    ]


def _round_rows(
    target: Tensor,
    scales: Tensor,
    lookup: Tensor,
    begins: Tensor,
    factor: Factor,
    sweeps: int,
    owners: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Levels [in, rows] and scales as stored [groups, rows], with error feedback along the inputs."""
    columns = len(target)
    levels = round_with_feedback(target, _spread(scales, columns), lookup, begins, factor.feedback)
    for _ in range(sweeps):
        if len(scales) == 1:
            fitted = refit(target, levels, factor.hessian)
            scales = torch.where(fitted > 0, _half(fitted[None], owners), scales)
        levels = descend(target, levels, _spread(scales, columns), lookup, begins, factor.hessian)
    return levels, scales


def _spread(scales: Tensor, columns: int) -> Tensor:
    """Stored scales [groups, rows] as float32 [1 or columns, rows]."""
    groups = len(scales)
    return scales.float() if groups == 1 else scales.float().repeat_interleave(columns // groups, 0)


def _row_scales(weight: Tensor, bits: int, name: str, groups: int) -> Tensor:
    """Scales as stored, float16 [groups, out]."""
    parts = weight.view(len(weight), groups, -1).unbind(1)
    return _half(torch.stack([search_scales(part, bits) for part in parts]), [name] * len(weight))


def decode(tensors: GridTensors) -> Tensor:
    """The weights [out, in] in float32, plainly."""
    out, columns = tensors.codes.shape
    groups = len(tensors.scales)
    levels = tensors.levels.float()[tensors.codes.long()]
    return (levels.view(out, groups, columns // groups) * tensors.scales.float().T[:, :, None]).view(out, columns)


def option_errors(
    weight: Tensor,
    hessian: Tensor,
    widths: Sequence[int] = WIDTHS,
    *,
    rounding: str = "gptq",
    factor: Factor | None = None,
    group_size: int | None = None,
    damping: float = DAMPING,
    sweeps: int = 0,
    name: str = "matrix",
) -> dict[int, Tensor]:
    """What each width would cost: for every output o, D_o H D_o^T of the rounded weight, float32 [out] per width.

    hessian [in, in] is undamped; factor, when given, is its factorisation (shared by matrices of the same input).
    Without sweeps the errors are about 5% above those of encode_group, at every width alike.
    """
    weight = _check(weight, name)
    if factor is None and rounding == "gptq":
        factor = factorize(hessian, damping, name)
    encoded = encode_group(
        [weight] * len(widths),
        factor,
        list(widths),
        rounding=rounding,
        group_size=group_size,
        sweeps=sweeps,
        names=[name] * len(widths),
    )
    return {
        width: quadratic_error(decode(tensors) - weight, hessian.float()) for width, tensors in zip(widths, encoded)
    }
