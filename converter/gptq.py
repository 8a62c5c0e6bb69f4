"""Rounding with error feedback (GPTQ, equivalently LDLQ), for any codec whose levels are integers times a row scale.

Minimises, for every row of a weight W [out, in], (W - Q) H (W - Q)^T, where H [in, in] is the mean of x x^T over
calibration tokens. With H = (I + U) D (I + U)^T, U strictly upper triangular, column k is rounded as
    Q_k = round(W_k + (W - Q)_{<k} U_{<k, k})
and the loss is exactly the sum of D_k times the squared rounding error of column k (Chee et al., QuIP, theorem 1).
Everything inside works on transposed weights [in, rows], so that one step reads and writes contiguous memory, and rows
of several matrices and widths can share a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from halfturn.error import Error
from torch import Tensor

STEPS = 512  # a level lookup has one entry for every half unit from -128 to 127.5
BLOCK = 32  # columns between two matrix products


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factorised once for all matrices that read the same input.

    hessian: [in, in] float32, damped, in `order`. feedback: [in, in] float32, U above (strictly upper triangular).
    diagonal: [in] float32, D above, the weight of each column's squared rounding error. order: [in] int64, the column
    rounded k-th. damping: what was added to the diagonal, as a fraction of its mean.
    """

    hessian: Tensor
    feedback: Tensor
    diagonal: Tensor
    order: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float = 0.01, act_order: bool = False) -> Factor:
    """Damps and factorises a Hessian [in, in]; damping is a fraction of the mean diagonal, raised until it succeeds.

    With act_order the columns of largest diagonal are rounded first. Inputs that are always zero get the mean diagonal:
    they are rounded to nearest and push no error around. Raises Error for a Hessian that isn't square and finite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise Error(f"a Hessian has shape {list(hessian.shape)}, not square: pass the mean of x x^T over tokens")
    if not torch.isfinite(hessian).all():
        raise Error("a Hessian has NaN or infinite entries: the calibration states overflowed")
    exact = hessian.double()
    exact = (exact + exact.T) / 2
    diagonal = exact.diagonal().clone()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else torch.ones((), dtype=torch.float64)
    exact[~alive, :] = 0
    exact[:, ~alive] = 0
    exact.diagonal()[~alive] = mean
    columns = len(diagonal)
    order = torch.argsort(exact.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    exact = exact[order][:, order]
    while True:
        damped = exact + torch.eye(columns, dtype=torch.float64) * (damping * mean)
        # The U D U^T factors of H are the L D L^T factors of H with rows and columns reversed.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damping = max(2 * damping, 1e-4)
    root = lower.flip(0, 1)
    pivots = root.diagonal().clone()
    return Factor(
        hessian=damped.float(),
        feedback=(root / pivots).triu(1).float(),
        diagonal=pivots.square().float(),
        order=order,
        damping=damping,
    )


def round_with_feedback(
    target: Tensor, scales: Tensor, lookup: Tensor, row_lookup: Tensor | None, feedback: Tensor, block: int = BLOCK
) -> Tensor:
    """Rounds target [in, rows] to integer levels [in, rows] (float32), with the feedback [in, in] of a Factor.

    scales: [in, rows] or [1, rows] float32. lookup: [tables * 512] float32, for each half unit from -128 the nearest
    level. row_lookup: [rows] int64, where each row's table begins, or None for one table.
    """
    columns, rows = target.shape
    levels = torch.empty_like(target)
    error = torch.empty_like(target)
    steps = torch.where(scales > 0, 2 / scales, 0)
    one_scale = len(scales) == 1
    base = torch.full((rows,), STEPS // 2, dtype=torch.int64)
    if row_lookup is not None:
        base += row_lookup
    index = torch.empty(rows, dtype=torch.int64)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        wanted = target[start:stop]
        if start:
            wanted = torch.addmm(wanted, feedback[:start, start:stop].T, error[:start])
        for k in range(start, stop):
            x = wanted[k - start]
            if k > start:
                x = torch.addmv(x, error[start:k].T, feedback[start:k, k])
            row = 0 if one_scale else k
            index.copy_(torch.mul(x, steps[row]).clamp_(-STEPS / 2, STEPS / 2 - 1).floor_())
            torch.index_select(lookup, 0, index.add_(base), out=levels[k])
            torch.addcmul(target[k], levels[k], scales[row], value=-1, out=error[k])
    return levels


def quadratic_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """D H D^T for every row of difference [rows, in]: float32 [rows]."""
    return ((difference @ hessian) * difference).sum(1)
