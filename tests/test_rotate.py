"""Rotations: orthogonal, the same function before and after, every product on its own in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfturn.converter.checkpoint import Source, open_source
from halfturn.error import Error
from random_models import AWKWARD, logits_of, open_model, random_tokens
from shared_data import STORIES, needs_stories
from tiny_sources import SMOLLM2, torch

from halfturn.converter.llama import GROUPS, layer_forward, plain_linear, rope_table  # isort: skip
from halfturn.converter import gptq  # isort: skip
from halfturn.converter.codecs import grid  # isort: skip
from one_matrix import encode  # isort: skip
from halfturn.converter.rotate import (  # isort: skip
    Orthogonal,
    Rotation,
    even_channels,
    even_factors,
    hadamard,
    hadamard_matrix,
    r4_block,
)


def relative(got, wanted) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_hadamard_known_answers() -> None:
    assert hadamard_matrix(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    spike = torch.zeros(8)
    spike[0] = 1
    assert hadamard(spike, 8).tolist() == pytest.approx([8**-0.5] * 8)
    assert hadamard(spike, 2).tolist() == pytest.approx([2**-0.5, 2**-0.5, 0, 0, 0, 0, 0, 0])
    assert hadamard(spike, 1).tolist() == spike.tolist()


@pytest.mark.parametrize("block", [2, 16, 256, 512, 1024, 4096])
def test_hadamard_is_the_matrix_and_its_own_inverse(block: int) -> None:
    x = torch.randn(3, 2 * block, dtype=torch.float64)
    slow = torch.cat([half @ hadamard_matrix(block).double() * block**-0.5 for half in x.split(block, 1)], 1)
    torch.testing.assert_close(hadamard(x, block), slow)
    torch.testing.assert_close(hadamard(hadamard(x, block), block), x)


@pytest.mark.parametrize("size", [1, 8, 64, 75, 80, 576, 1536])
def test_orthogonal(size: int) -> None:
    turn = Orthogonal(size, 7)
    matrix = turn.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    x = torch.randn(5, size, dtype=torch.float64)
    torch.testing.assert_close(turn.right(x), x @ matrix)
    torch.testing.assert_close(turn.left(x.T), matrix.T @ x.T)
    torch.testing.assert_close(turn.right(x.float()), (x @ matrix).float())
    torch.testing.assert_close(turn.left(x.T.float()), (matrix.T @ x.T).float())
    assert torch.equal(matrix, Orthogonal(size, 7).matrix())
    assert size == 1 or not torch.allclose(matrix, Orthogonal(size, 8).matrix())


@pytest.mark.parametrize(
    ("size", "parallel", "block"),
    [(1536, 2, 256), (11008, 2, 128), (14336, 2, 1024), (14336, 8, 256), (172, 2, 2), (8192, 1, 1024), (75, 2, 1)],
)
def test_r4_block(size: int, parallel: int, block: int) -> None:
    assert r4_block(size, parallel) == block


def test_even_factors() -> None:
    lengths = torch.tensor([4, 2, 1, 0.05, 0])
    assert even_factors(lengths).tolist() == pytest.approx([1, 0.5, 0.25, 1 / 32, 1 / 32])
    assert even_factors(lengths[:3], 0.5).tolist() == pytest.approx([1, 0.5**0.5, 0.5])
    assert even_factors(torch.zeros(2)).tolist() == [1, 1]


def test_channels_of_any_scale_are_rounded_alike(tmp_path: Path) -> None:
    """A model whose up_proj and down_proj share out their scales unevenly gets the matrices of its even twin."""
    source = open_model(tmp_path, AWKWARD)
    rotation = Rotation(source.config, seed=3)
    even = {name: tensor.double() for name, tensor in source.layer(0).items()}
    uneven = dict(even)
    generator = torch.Generator().manual_seed(1)
    scale = (torch.randn(source.config.intermediate_size, generator=generator, dtype=torch.float64) / 4).exp()
    uneven["mlp.up_proj.weight"] = even["mlp.up_proj.weight"] * scale[:, None]
    uneven["mlp.up_proj.bias"] = even["mlp.up_proj.bias"] * scale
    uneven["mlp.down_proj.weight"] = even["mlp.down_proj.weight"] / scale
    one, other = rotation.layer(0, even), rotation.layer(0, uneven)
    ratio = float(one["mlp.down_proj.weight"].norm() / other["mlp.down_proj.weight"].norm())  # the longest column's
    torch.testing.assert_close(one["mlp.down_proj.weight"], other["mlp.down_proj.weight"] * ratio)
    torch.testing.assert_close(one["mlp.up_proj.bias"], other["mlp.up_proj.bias"] / ratio)
    lengths = hadamard(one["mlp.down_proj.weight"], rotation.r4_block).norm(dim=0)
    torch.testing.assert_close(lengths, lengths.mean().expand_as(lengths))


def test_even_columns_are_rounded_best() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(128) + 0.5 * torch.randn(128, 128, generator=generator) / 128**0.5
    states = torch.randn(4000, 128, generator=generator) @ mix
    weight = torch.randn(32, 128, generator=generator) * (torch.randn(128, generator=generator) / 2).exp()

    def loss(power: float) -> float:
        factors = even_factors(weight.norm(dim=0), power)
        inputs, turned = hadamard(states * factors, 128), hadamard(weight / factors, 128)
        factor = gptq.factorize(inputs.T @ inputs / len(inputs))
        error = turned - grid.decode(encode(turned, factor, 4))
        return float((inputs @ error.T).square().sum())

    losses = {power: loss(power) for power in (0.0, 0.5, 1.0, 1.5)}
    assert min(losses, key=losses.__getitem__) == 1.0
    assert losses[1.0] < 0.85 * losses[0.0]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Error, match="--tensor-parallel 3 doesn't divide the intermediate size 1024"):
        r4_block(1024, 3)
    with pytest.raises(Error, match="rotation is 'random', it can be hadamard or none"):
        Rotation(open_model(tmp_path).config, "random")


def test_each_product_in_float64(tmp_path: Path) -> None:
    """Turned inputs give the same q, k, gate and up, values turned by R2, and o and down turned by R1."""
    source = open_model(tmp_path, AWKWARD)
    config, rotation = source.config, Rotation(source.config, seed=3)
    plain = {name: tensor.double() for name, tensor in source.layer(1).items()}
    turned = rotation.layer(1, plain)
    assert all(bool((turned[name] == 1).all()) for name in turned if "norm" in name)
    assert rotation.r4_block == 8 and rotation.r1 is not None
    r1, r2 = rotation.r1.matrix(), rotation.r2(1).matrix()

    def outputs(tensors, hidden, block):
        seen, linear = {}, plain_linear(tensors)

        def watch(name, x):
            seen[name] = linear(name, x)
            return seen[name]

        rope = rope_table(config, torch.arange(hidden.shape[1]))
        seen["layer"] = layer_forward(config, tensors, hidden, rope, linear=watch, r4_block=block)
        return seen

    hidden = torch.randn(2, 7, config.hidden_size, dtype=torch.float64)
    before, after = outputs(plain, hidden, 1), outputs(turned, hidden @ r1, rotation.r4_block)
    even = even_channels(plain, config)
    scale = {name: even[f"{name}.bias"] / plain[f"{name}.bias"] for name in ("mlp.up_proj", "self_attn.v_proj")}
    heads = (before["self_attn.v_proj"] * scale["self_attn.v_proj"]).unflatten(-1, (-1, config.head_dim))
    wanted = {name: before[name] for group in GROUPS for name in group} | {
        "mlp.up_proj": before["mlp.up_proj"] * scale["mlp.up_proj"],
        "self_attn.v_proj": (heads @ r2).flatten(-2),
        "self_attn.o_proj": before["self_attn.o_proj"] @ r1,
        "mlp.down_proj": before["mlp.down_proj"] @ r1,
        "layer": before["layer"] @ r1,
    }
    assert wanted.keys() == after.keys()
    for name, value in wanted.items():
        # cos and sin come from a float32 table, the same for both
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["hadamard", "none"])
def test_whole_random_model_in_float64(tmp_path: Path, kind: str) -> None:
    source = open_model(tmp_path, AWKWARD)
    tokens = random_tokens(source)
    before = logits_of(source, tokens, dtype=torch.float64)
    after = logits_of(source, tokens, Rotation(source.config, kind), torch.float64)
    assert relative(after, before) < 1e-10
    assert float(before.std()) > 0.3  # the comparison is of logits that say something


def check_float32(source: Source) -> None:
    tokens = random_tokens(source)
    before = logits_of(source, tokens)
    for kind in ("hadamard", "none"):
        assert relative(logits_of(source, tokens, Rotation(source.config, kind)), before) < 1e-4


def test_random_model_in_float32(tmp_path: Path) -> None:
    check_float32(open_model(tmp_path, AWKWARD))


@needs_stories
def test_stories_in_float32() -> None:
    check_float32(open_source(STORIES))


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="SmolLM2 is not here: scripts/get_model.py gets it")
def test_smollm2_in_float32() -> None:
    check_float32(open_source(SMOLLM2))


def test_the_seed_decides(tmp_path: Path) -> None:
    source = open_model(tmp_path, AWKWARD)
    layer = source.layer(0)
    first, again, other = (Rotation(source.config, seed=seed).layer(0, layer) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.allclose(first["mlp.up_proj.weight"], other["mlp.up_proj.weight"])
    assert torch.equal(layer["mlp.up_proj.weight"], source.layer(0)["mlp.up_proj.weight"])  # the input is left alone


def test_outliers_are_spread(tmp_path: Path) -> None:
    """A channel a hundred times as large as the others no longer stands out once the weights are turned."""
    source = open_model(tmp_path, {**AWKWARD, "hidden_size": 128})
    layer = source.layer(0)
    layer["mlp.gate_proj.weight"][:, 5] *= 100
    turned = Rotation(source.config).layer(0, layer)["mlp.gate_proj.weight"]

    def crest(weight) -> float:
        return float((weight.abs().amax(1) / weight.square().mean(1).sqrt()).mean())

    assert crest(layer["mlp.gate_proj.weight"]) > 8
    assert crest(turned) < 4
