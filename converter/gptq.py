"""Rounding with error feedback (GPTQ, equivalently LDLQ), for any codec whose levels are integers times a row scale.

Minimises, for every row of a weight W [out, in], (W - Q) H (W - Q)^T, where H [in, in] is the mean of x x^T over
calibration tokens. With H = (I + U) D (I + U)^T, U strictly upper triangular, column k is rounded as
    Q_k = round(W_k + (W - Q)_{<k} U_{<k, k})
and the loss is exactly the sum of D_k times the squared rounding error of column k (Chee et al., QuIP, theorem 1).
Everything inside works on transposed weights [in, rows], so that one step reads and writes contiguous memory, and rows
of several matrices and widths can share a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from halfturn.error import Error

STEPS = 512  # a level lookup has one entry for every half unit from -128 to 127.5
BLOCK = 32  # columns between two matrix products
DAMPING = 0.01  # of the mean diagonal; .003 is as good, .03 costs 1% and .1 costs 4% of the loss
PARTS = 4  # of the rows whose errors add up
ROW_DAMPING = 0.1  # of the mean diagonal of a block's G; .05 to .2 are as good
NEAR = 8  # eigenvectors on each side whose share is much the same


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factorised once for all matrices that read the same input.

    hessian: [in, in] float32, damped. feedback: [in, in] float32, U above (strictly upper triangular). diagonal: [in]
    float32, D above, the weight of each column's squared rounding error. damping: what was added to the diagonal.
    """

    hessian: Tensor
    feedback: Tensor
    diagonal: Tensor
    damping: float

    @cached_property
    def modes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [in] and eigenvectors [in, in] (in columns) of the damped Hessian."""
        values, vectors = torch.linalg.eigh(self.hessian)
        return values.clamp(min=self.damping), vectors  # no true one is smaller


def factorize(hessian: Tensor, damping: float = DAMPING, name: str = "a matrix") -> Factor:
    """Damps and factorises a Hessian [in, in]; damping is a fraction of the mean diagonal, raised until it succeeds.

    Inputs that are always zero get the mean diagonal: they are rounded to nearest and push no error around. Columns
    keep their order: rounding those of largest diagonal first lowered the loss by less than 1%. Raises Error for a
    Hessian that isn't square and finite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise Error(f"the Hessian of {name} has shape {list(hessian.shape)}, not square: pass the mean of x x^T")
    if not torch.isfinite(hessian).all():
        raise Error(f"the Hessian of {name} has NaN or infinite entries: the calibration states overflowed before it")
    exact = hessian.double()
    exact = (exact + exact.T) / 2
    alive = exact.diagonal() > 0
    mean = exact.diagonal()[alive].mean() if bool(alive.any()) else exact.new_ones(())
    exact[~alive, :] = 0
    exact[:, ~alive] = 0
    exact.diagonal()[~alive] = mean
    while True:
        damped = exact.clone()
        damped.diagonal().add_(damping * mean)
        # The U D U^T factors of H are the L D L^T factors of H with rows and columns reversed.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damping = max(2 * damping, 1e-4)
    root = lower.flip(0, 1)
    pivots = root.diagonal()
    return Factor(
        hessian=damped.float(),
        feedback=(root / pivots).triu(1).float(),
        diagonal=pivots.square().float(),
        damping=float(damping * mean),
    )


def correct(weight: Tensor, factor: Factor, pulls: Sequence[Tensor]) -> Tensor:
    """The weight [out, in] to round instead, so that its products on quantized states come closer to what is wanted.

    factor is of H, the mean of x x^T over quantized states x. pulls: the mean of e x^T [out, in] over each half of the
    tokens, e [out] what W x lacks of what is wanted. Least squares would add pull H^-1, but statistics of a finite text
    overfit. So of what it adds along each eigenvector of H only the share is taken that isn't chance, which the
    difference of the halves tells (a Wiener filter). After GPTAQ (Li et al. 2025), which takes all of it.
    """
    values, vectors = factor.modes
    one, other = (pull.float() @ vectors for pull in pulls)
    pull = (one + other) / 2
    power, chance = (_smooth(part.square().sum(0) / values) for part in (pull, (one - other) / 2))
    share = torch.where(power > chance, 1 - chance / power, 0)
    return weight + (pull * (share / values)) @ vectors.T


def _smooth(values: Tensor) -> Tensor:
    """Each value's mean with its neighbours."""
    return F.avg_pool1d(values[None, None], 2 * NEAR + 1, 1, NEAR, count_include_pad=False)[0, 0]


@dataclass(frozen=True)
class Part:
    """Rows that are rounded together, after others whose errors they make up for.

    rows: [blocks * n] int64, block by block. before: [blocks * done] int64, rows of the same blocks that are rounded
    already. feedback: [blocks, n, done] float32.
    """

    rows: Tensor
    before: Tensor
    feedback: Tensor

    def target(self, target: Tensor, error: Tensor) -> Tensor:
        """What to round instead of target [in, rows] at these rows, after `error` [in, rows] was made at others."""
        blocks, count, done = self.feedback.shape
        if not done:
            return target[:, self.rows]
        made = error[:, self.before].view(-1, blocks, done).transpose(0, 1)
        shift = (made @ self.feedback.transpose(1, 2)).transpose(0, 1)
        return target[:, self.rows] + shift.reshape(-1, blocks * count)


def row_parts(moments: Tensor, parts: int = PARTS) -> list[Part]:
    """How rows whose errors add up are rounded in turn; moments [blocks, size, size] is G of every block.

    Error feedback again, along outputs: the loss of a block of rows is the trace of G E H E^T, E the errors and G the
    second moments of the gradients at the outputs (the Kronecker form of YAQA, Tseng et al. 2025). Given the errors of
    rows P, whatever H is, those of the others R should be -G_RR^-1 G_RP E_P. Rows that no others can make up for come
    first. Four parts come close to row by row: on tokens that G has not seen, SmolLM2's q and k lose .34 of what they
    lose without, and .29 row by row.
    """
    mean = moments.double().diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    damped = moments.double() + ROW_DAMPING * mean[:, None, None] * torch.eye(moments.shape[1], dtype=torch.float64)
    order = torch.linalg.inv(damped).diagonal(dim1=1, dim2=2).argsort(1)
    blocks, size = order.shape
    flat = order + size * torch.arange(blocks)[:, None]
    in_order = damped.gather(1, order[:, :, None].expand_as(damped)).gather(2, order[:, None, :].expand_as(damped))
    found, done = [], 0
    for rows in flat.chunk(parts, 1):
        count = rows.shape[1]
        feedback = torch.linalg.solve(in_order[:, done:, done:], in_order[:, done:, :done])[:, :count]
        found.append(Part(rows.reshape(-1), flat[:, :done].reshape(-1), feedback.float()))
        done += count
    return found


def row_gain(moments: Tensor, judged: Tensor, parts: int = PARTS) -> float:
    """The loss with row_parts(moments) over that of independent rows where G is `judged`, of other tokens; both
    [blocks, size, size]."""
    blocks, size, _ = moments.shape
    # What becomes of each row's own rounding error, in itself and in those that make up for it.
    made = torch.eye(size, dtype=torch.float64).repeat(blocks, 1)
    for part in row_parts(moments, parts):
        _, count, done = part.feedback.shape
        before = made[part.before].view(blocks, done, size)
        made[part.rows] -= (part.feedback.double() @ before).view(blocks * count, size)
    made, judged = made.view(blocks, size, size), judged.double()
    alone = float(judged.diagonal(dim1=1, dim2=2).sum())
    return float((judged @ made * made).sum()) / alone if alone else 1.0


def _steps(scales: Tensor) -> Tensor:
    """Half units a weight: what round_with_feedback multiplies by before it looks a level up."""
    return torch.where(scales > 0, 2 / scales, 0)


def round_to_nearest(target: Tensor, scales: Tensor, lookup: Tensor, begins: Tensor) -> Tensor:
    """Rounds target [in, rows] to integer levels [in, rows], each weight by itself; arguments as below."""
    index = (
        (target * _steps(scales)).clamp_(-STEPS / 2, STEPS / 2 - 1).floor_().to(torch.int32).add_(begins + STEPS // 2)
    )
    return lookup.index_select(0, index.view(-1)).view_as(target)


def round_with_feedback(
    target: Tensor, scales: Tensor, lookup: Tensor, begins: Tensor, feedback: Tensor, block: int = BLOCK
) -> Tensor:
    """Rounds target [in, rows] to integer levels [in, rows] (float32), with the feedback [in, in] of a Factor.

    scales: [in, rows] or [1, rows] float32. lookup: [tables * 512] float32, for each half unit from -128 the nearest
    level. begins: [rows] int32, where each row's table begins.
    """
    columns = len(target)
    levels, error = torch.empty_like(target), torch.empty_like(target)
    steps = _steps(scales)
    origin = begins + STEPS // 2
    index = torch.empty_like(origin)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        wanted = target[start:stop]
        if start:
            wanted = torch.addmm(wanted, feedback[:start, start:stop].T, error[:start])
        for k in range(start, stop):
            x = wanted[k - start]
            if k > start:
                x = torch.addmv(x, error[start:k].T, feedback[start:k, k])
            row = k if len(scales) > 1 else 0
            index.copy_(torch.mul(x, steps[row]).clamp_(-STEPS / 2, STEPS / 2 - 1).floor_())
            torch.index_select(lookup, 0, index.add_(origin), out=levels[k])
            torch.addcmul(target[k], levels[k], scales[row], value=-1, out=error[k])
    return levels


def descend(
    target: Tensor,
    levels: Tensor,
    scales: Tensor,
    lookup: Tensor,
    begins: Tensor,
    hessian: Tensor,
    block: int = BLOCK,
) -> Tensor:
    """One sweep of coordinate descent: every column is rounded again, given all others; the loss can only fall.

    Arguments as for round_with_feedback, hessian [in, in] as in a Factor. Returns new levels [in, rows].
    """
    columns = len(target)
    levels = levels.clone()
    error = torch.addcmul(target, levels, scales, value=-1)
    steps = _steps(scales)
    origin = begins + STEPS // 2
    index = torch.empty_like(origin)
    pull = hessian / hessian.diagonal()[:, None]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        before = error[start:stop].clone()
        pulled = pull[start:stop] @ error
        for k in range(start, stop):
            x = pulled[k - start]
            if k > start:
                x = torch.addmv(x, (error[start:k] - before[: k - start]).T, pull[k, start:k])
            row = k if len(scales) > 1 else 0
            x = torch.addcmul(x, levels[k], scales[row])
            index.copy_(x.mul_(steps[row]).clamp_(-STEPS / 2, STEPS / 2 - 1).floor_())
            torch.index_select(lookup, 0, index.add_(origin), out=levels[k])
            torch.addcmul(target[k], levels[k], scales[row], value=-1, out=error[k])
    return levels


def refit(target: Tensor, levels: Tensor, hessian: Tensor) -> Tensor:
    """The scale [rows] that fits levels [in, rows] to target [in, rows] best under the Hessian; 0 where none does."""
    pulled = hessian @ levels
    norm = (pulled * levels).sum(0)
    return torch.where(norm > 0, (pulled * target).sum(0) / norm, 0)


def quadratic_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """D H D^T for every row of difference [rows, in]: float32 [rows]."""
    return ((difference @ hessian) * difference).sum(1)
