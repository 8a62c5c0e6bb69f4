"""Rounding with error feedback: against the textbook loop, optimality of each step, and hard Hessians."""

from __future__ import annotations

from itertools import pairwise

import pytest

from halfturn.error import Error
from tiny_sources import torch

from halfturn.converter import gptq  # isort: skip
from halfturn.converter.codecs import grid  # isort: skip
from one_matrix import encode, rtn  # isort: skip


def correlated(inputs: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """The Hessian of states whose channels differ in size and hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -1.5, inputs)
    states = torch.randn(tokens, inputs, generator=generator) @ mix
    return states.T @ states / tokens


def rows(out: int, inputs: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def textbook_gptq(weight, hessian, scale, levels):
    """Frantar et al. 2022: round a column, spread its error over the rest by the Cholesky factor of the inverse."""
    w = weight.double().clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    values = levels.double()
    codes = torch.zeros_like(w)
    for k in range(w.shape[1]):
        nearest = (w[:, k : k + 1] / scale.double()[:, None] - values).abs().argmin(1)
        codes[:, k] = values[nearest]
        error = (w[:, k] - codes[:, k] * scale.double()) / upper[k, k]
        w[:, k:] -= error[:, None] * upper[k : k + 1, k:]
    return codes


def begins(out: int) -> torch.Tensor:
    return torch.zeros(out, dtype=torch.int32)


def test_factor_rebuilds_the_hessian() -> None:
    hessian = correlated(96)
    factor = gptq.factorize(hessian, 0.02)
    mixed = torch.eye(96, dtype=torch.float64) + factor.feedback.double()
    rebuilt = mixed @ torch.diag(factor.diagonal.double()) @ mixed.T
    wanted = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(rebuilt.float(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factor.hessian, wanted, rtol=1e-5, atol=1e-6)
    assert factor.damping == pytest.approx(0.02 * float(hessian.diagonal().mean()), rel=1e-5)
    assert not factor.feedback.tril().any()


@pytest.mark.parametrize(("out", "inputs", "bits"), [(24, 96, 3), (7, 33, 4), (3, 64, 2), (16, 70, 8)])
def test_same_levels_as_the_textbook_loop(out: int, inputs: int, bits: int) -> None:
    hessian, weight = correlated(inputs), rows(out, inputs)
    factor = gptq.factorize(hessian)
    scale = weight.square().mean(1).sqrt() * grid.gaussian_unit(bits)
    got = gptq.round_with_feedback(
        weight.T.contiguous(), scale[None], grid.lookup_table(bits), begins(out), factor.feedback
    )
    wanted = textbook_gptq(weight, factor.hessian, scale, torch.from_numpy(grid.gaussian_levels(bits)))
    assert float((wanted.float() == got.T).float().mean()) > (0.97 if bits == 8 else 0.995)  # ties in float32


def test_blocks_change_nothing_but_rounding_order() -> None:
    hessian, weight = correlated(80), rows(9, 80)
    feedback = gptq.factorize(hessian).feedback
    scale = weight.abs().amax(1)[None] / 100
    runs = [
        gptq.round_with_feedback(weight.T.contiguous(), scale, grid.lookup_table(4), begins(9), feedback, block)
        for block in (1, 7, 32, 80)
    ]
    assert all(float((run == runs[0]).float().mean()) > 0.99 for run in runs)


def test_loss_is_the_sum_that_the_factor_promises() -> None:
    hessian, weight = correlated(64), rows(12, 64)
    factor = gptq.factorize(hessian)
    encoded = grid.decode(encode(weight, factor, 4, sweeps=0))
    difference = (weight - encoded).double()
    # Rounding error of each column: what was rounded (weight plus feedback) less the result.
    own = difference + difference @ factor.feedback.double()
    promised = (own.square() * factor.diagonal.double()).sum(1)
    torch.testing.assert_close(
        gptq.quadratic_error(difference.float(), factor.hessian), promised.float(), rtol=1e-3, atol=1e-7
    )


def test_each_improvement_lowers_the_loss() -> None:
    hessian, weight = correlated(128), rows(64, 128)
    factor = gptq.factorize(hessian)

    def loss(encoded: grid.GridTensors) -> float:
        return float(gptq.quadratic_error(grid.decode(encoded) - weight, factor.hessian).sum())

    losses = [loss(rtn(weight, 3))] + [loss(encode(weight, factor, 3, sweeps=n)) for n in (0, 1, 2, 4)]
    assert losses[1] < 0.75 * losses[0]
    assert losses[2] < 0.97 * losses[1]
    assert all(after < before for before, after in pairwise(losses))


def test_descent_never_raises_a_rows_loss_and_ends_in_a_coordinate_minimum() -> None:
    hessian, weight = correlated(48), rows(10, 48)
    factor = gptq.factorize(hessian)
    scale = (weight.square().mean(1).sqrt() * grid.gaussian_unit(3))[None]
    target, lookup = weight.T.contiguous(), grid.lookup_table(3)

    def loss(levels: torch.Tensor) -> torch.Tensor:
        return gptq.quadratic_error((target - levels * scale).T, factor.hessian)

    levels = gptq.round_to_nearest(target, scale, lookup, begins(10))
    for _ in range(50):
        after = gptq.descend(target, levels, scale, lookup, begins(10), factor.hessian)
        assert (loss(after) <= loss(levels) * (1 + 1e-5)).all()
        if torch.equal(after, levels):
            break
        levels = after
    least = loss(levels)
    for value in torch.from_numpy(grid.gaussian_levels(3)).float():
        for k in range(48):
            other = levels.clone()
            other[k] = value
            assert (loss(other) >= least * (1 - 1e-5)).all()


def test_refit_is_least_squares() -> None:
    hessian, weight = correlated(40).double(), rows(6, 40).double()
    levels = (weight.T * 100).round()
    levels[:, 3] = 0
    best = gptq.refit(weight.T.contiguous(), levels, hessian)
    assert float(best[3]) == 0 and float((best[best != 0] - 0.01).abs().max()) < 0.005

    def loss(scale: torch.Tensor) -> torch.Tensor:
        return gptq.quadratic_error(weight - (levels * scale).T, hessian)

    for stretch in (0.98, 1.02):
        assert (loss(best * stretch)[best != 0] > loss(best)[best != 0]).all()


def test_white_inputs_round_to_nearest() -> None:
    weight = rows(8, 64)
    plain = rtn(weight, 4)
    fed = encode(weight, torch.eye(64) * 3, 4, sweeps=0)
    assert torch.equal(plain.codes, fed.codes) and torch.equal(plain.scales, fed.scales)


def test_dead_and_dependent_inputs() -> None:
    states = torch.randn(30, 64, generator=torch.Generator().manual_seed(3))  # fewer tokens than inputs
    states[:, 5], states[:, 17], states[:, 20] = 0, 0, states[:, 21]
    hessian, weight = states.T @ states / 30, rows(8, 64)
    decoded = grid.decode(encode(weight, hessian, 4))
    assert torch.isfinite(decoded).all()
    nearest = grid.decode(rtn(weight, 4))
    assert float((decoded - weight)[:, [5, 17]].abs().max()) < 4 * float((nearest - weight).abs().max())
    assert float(gptq.quadratic_error(decoded - weight, hessian).sum()) < 0.5 * float(
        gptq.quadratic_error(nearest - weight, hessian).sum()
    )


def test_an_indefinite_hessian_is_damped_until_it_works() -> None:
    hessian = correlated(32)
    hessian -= 0.2 * hessian.diagonal().mean() * torch.eye(32)
    factor = gptq.factorize(hessian, 0.01)
    assert factor.damping > 0.01 * float(hessian.diagonal().mean())
    assert torch.isfinite(factor.feedback).all() and (factor.diagonal > 0).all()


def test_no_tokens_at_all() -> None:
    weight = rows(4, 32)
    assert torch.equal(encode(weight, torch.zeros(32, 32), 4).codes, rtn(weight, 4).codes)


def test_bad_hessians_are_refused() -> None:
    with pytest.raises(Error, match=r"shape \[3, 4\], not square"):
        gptq.factorize(torch.ones(3, 4))
    with pytest.raises(Error, match=r"Hessian of layers\.3\.up_proj has NaN or infinite"):
        gptq.factorize(torch.full((4, 4), float("inf")), name="layers.3.up_proj")


@pytest.mark.parametrize("tokens", [200, 4096])
def test_correction_brings_products_closer_to_the_originals(tokens: int) -> None:
    """On tokens that it has not seen; the fewer it has, the less of what they say is taken."""
    generator = torch.Generator().manual_seed(4)
    mix, weight = torch.randn(64, 64, generator=generator), rows(16, 64)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        original = torch.randn(count, 64, generator=generator) @ mix
        return original, original + 0.1 * original.roll(1, 1) + torch.randn(count, 64, generator=generator)

    (original, states), (fresh_original, fresh_states) = draw(tokens), draw(8192)
    lacking = (original - states) @ weight.T
    factor = gptq.factorize(states.T @ states / tokens, 1e-6)
    pulls = [e.T @ x / len(x) for e, x in zip(lacking.chunk(2), states.chunk(2))]

    def error(changed: torch.Tensor) -> float:
        return float((fresh_original @ weight.T - fresh_states @ changed.T).square().mean())

    corrected = gptq.correct(weight, factor, pulls)
    fitted = torch.linalg.lstsq(states, original @ weight.T).solution.T
    assert error(corrected) < 0.97 * error(weight)
    assert error(corrected) < (0.9 if tokens == 200 else 1.001) * error(fitted)
    encoded = [grid.decode(encode(weight, factor, 6, pulls=p)) for p in (None, pulls)]
    assert error(encoded[1]) < 0.97 * error(encoded[0])


def test_correction_takes_nothing_from_chance() -> None:
    generator = torch.Generator().manual_seed(5)
    states, weight = torch.randn(512, 64, generator=generator), rows(256, 64)
    factor = gptq.factorize(states.T @ states / 512)
    noise = 0.05 * torch.randn(512, 256, generator=generator)
    pulls = [e.T @ x / len(x) for e, x in zip(noise.chunk(2), states.chunk(2))]
    taken = gptq.correct(weight, factor, pulls) - weight
    all_of_it = torch.linalg.solve(factor.hessian, sum(pulls).T / 2).T
    assert float(taken.norm()) < 0.15 * float(all_of_it.norm())
    assert torch.equal(gptq.correct(weight, factor, [pulls[0], -pulls[0]]), weight)
    torch.testing.assert_close(gptq.correct(weight, factor, [pulls[0]] * 2) - weight,
                               torch.linalg.solve(factor.hessian, pulls[0].T).T, rtol=1e-3, atol=1e-5)  # fmt: skip


def gradient_moments(blocks: int, size: int, tokens: int, seed: int = 7) -> torch.Tensor:
    """Second moments of gradients that move together in each block."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(blocks, size, size, generator=generator) * torch.logspace(0, -1, size)
    drawn = torch.randn(tokens, blocks, size, generator=torch.Generator().manual_seed(seed + tokens))
    g = torch.einsum("tbi,boi->tbo", drawn, mix)
    return torch.einsum("tbi,tbj->bij", g, g) / tokens


def test_row_parts_leave_the_pivots_of_the_moments() -> None:
    """Row by row, white errors cost what the factors of G say; every row is in one part, and in one only."""
    moments = gradient_moments(3, 16, 4000)
    parts = gptq.row_parts(moments, 16)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(48))
    damped = moments.double() + gptq.ROW_DAMPING * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(
        16
    )
    wanted = 0.0
    for block, matrix in enumerate(damped):
        order = torch.cat([part.rows.view(3, -1)[block] for part in parts]) - 16 * block
        # Against the rest, which will make up for it, a row costs its pivot in the factors from the last row on.
        wanted += float(torch.linalg.cholesky(matrix[order][:, order].flip(0, 1)).diagonal().square().sum())
    assert gptq.row_gain(moments, damped, 16) == pytest.approx(
        wanted / float(damped.diagonal(dim1=1, dim2=2).sum()), rel=1e-4
    )


def test_rows_that_hang_together_are_rounded_together() -> None:
    moments, judged = gradient_moments(2, 32, 4000), gradient_moments(2, 32, 3000)
    hessian, weight = correlated(64), rows(80, 64)
    factor, parts = gptq.factorize(hessian), gptq.row_parts(moments)

    def loss(decoded: torch.Tensor) -> float:
        error = (weight[:64] - decoded).view(2, 32, 64)
        return float(((judged @ error @ hessian) * error).sum())

    alone = grid.encode_group([weight[:64], weight[64:]], factor, [4, 3])
    together = grid.encode_group([weight[:64], weight[64:]], factor, [4, 3], parts=parts)
    gain = gptq.row_gain(moments, judged)
    assert gain < 0.6
    assert loss(grid.decode(together[0])) == pytest.approx(gain * loss(grid.decode(alone[0])), rel=0.15)
    assert torch.equal(together[1].codes, alone[1].codes) and torch.equal(together[1].scales, alone[1].scales)


def test_independent_rows_are_rounded_alone() -> None:
    moments = torch.diag_embed(torch.rand(2, 10, generator=torch.Generator().manual_seed(1)) + 0.1)
    parts, factor, weight = gptq.row_parts(moments), gptq.factorize(correlated(48)), rows(20, 48)
    assert [len(part.rows) for part in parts] == [6, 6, 6, 2]
    assert gptq.row_gain(moments, moments) == pytest.approx(1)
    assert torch.equal(grid.encode_group([weight], factor, [3], parts=parts)[0].codes, encode(weight, factor, 3).codes)
    assert gptq.row_gain(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)) == 1  # no gradient at all
