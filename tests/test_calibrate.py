"""Calibration: sampled text, Hessians and moments, states through quantized layers, and what they are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfturn.converter.architectures import NORMS
from halfturn.converter.checkpoint import open_source
from halfturn.error import Error
from random_models import AWKWARD, logits_of, random_tokens, write_model
from shared_data import STORIES, needs_stories
from tiny_sources import one_thread, torch  # noqa: F401 - a fixture for every test here

from halfturn.converter.calibrate import (  # isort: skip
    Moment,
    advance,
    first_states,
    layer_hessians,
    round_layer,
    sensitivities,
)
from halfturn.converter.llama import GROUPS, layer_forward, logits, rope_table  # isort: skip
from halfturn.converter.measure import Comparison  # isort: skip
from halfturn.converter.packed import pack, unpack  # isort: skip
from halfturn.converter.text import draw, sample_text  # isort: skip
from one_matrix import rtn  # isort: skip


def test_draw_follows_the_distribution() -> None:
    scores = torch.tensor([[0.0, 1.0, -2.0, float("-inf")]]).expand(40000, -1)
    counts = torch.bincount(draw(scores, torch.Generator().manual_seed(0)), minlength=4) / 40000
    torch.testing.assert_close(counts, scores[0].softmax(-1), atol=0.01, rtol=0)
    assert counts[3] == 0


def test_sampled_text_is_seeded_and_starts_anew_after_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_model(tmp_path, {"bos_token_id": 3, "eos_token_id": [4, 5]}))
    text = sample_text(source, 8, 16, seed=1)
    assert text.shape == (8, 16) and text.dtype == torch.int64
    assert text[::2, 0].tolist() == [3] * 4
    assert torch.equal(text, sample_text(source, 8, 16, seed=1))
    assert not torch.equal(text, sample_text(source, 8, 16, seed=2))
    monkeypatch.setattr("halfturn.converter.text.draw", lambda scores, generator: torch.full((len(scores),), 4))
    text = sample_text(source, 8, 64, seed=1)
    ended = torch.isin(text[:, :-1], torch.tensor([4, 5]))
    assert (text[:, 1:][~ended] == 4).all()
    assert len(text[:, 1:][ended].unique()) > 40  # of 50 tokens, none of them drawn


@needs_stories
def test_sampled_stories_are_likely_under_the_model() -> None:
    source = open_source(STORIES)
    text = sample_text(source, 4, 96, seed=0)
    log_p = logits_of(source, text).log_softmax(-1)
    loss = -log_p[:, :-1].gather(-1, text[:, 1:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert abs(float(loss - entropy)) < 0.25  # text at temperature 1 costs its entropy
    assert float(loss) < 3


def test_hessians_are_the_mean_outer_products_of_inputs(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path, AWKWARD))
    config, tensors = source.config, source.layer(0)
    tokens = random_tokens(source, 19, 8)  # two batches of unequal size
    states = first_states(tokens, source.embedding())
    found = layer_hessians(config, tensors, states, 4)
    inputs: dict[str, Any] = {}

    def watch(name, x):
        inputs[name] = x
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    rope = rope_table(config, torch.arange(8))
    out = layer_forward(config, tensors, source.embedding()[tokens], rope, linear=watch, r4_block=4)
    torch.testing.assert_close(torch.cat(states), out)
    assert set(found) == {group[0] for group in GROUPS}
    for group in GROUPS:
        x = inputs[group[0]].reshape(-1, inputs[group[0]].shape[-1]).double()
        for name in group:
            assert torch.equal(inputs[name], inputs[group[0]])
        torch.testing.assert_close(found[group[0]].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_moments_predict_a_small_change(tmp_path: Path) -> None:
    """1/2 sum S_o D H D^T of random noise in one matrix is the KL divergence that the noise causes."""
    source = open_source(write_model(tmp_path, {**AWKWARD, "attention_bias": False, "mlp_bias": False}, seed=2))
    config, ones = source.config, torch.ones(source.config.hidden_size)
    tokens = random_tokens(source, 64, 32)
    head = source.head() * source.final_norm()
    layers = [source.layer(i) for i in range(config.num_hidden_layers)]
    found = dict(sensitivities(config, lambda i: layers[i], source.embedding(), ones, head, tokens, 1, seed=0))
    assert list(found) == [3, 2, 1, 0] and found[3]["lm_head"].moment.shape == (config.vocab_size,)

    def answers(changed: int, tensors: Mapping[str, Any]) -> Any:
        states = first_states(tokens, source.embedding())
        for i, layer in enumerate(layers):
            advance(config, tensors if i == changed else layer, states, 1)
        return logits(config, torch.cat(states), ones, head).log_softmax(-1)

    generator = torch.Generator().manual_seed(1)
    plain = answers(-1, {})
    for index, group in ((0, GROUPS[3]), (1, GROUPS[0]), (2, GROUPS[1]), (2, GROUPS[2])):
        name = group[-1]
        noise = 0.02 * torch.randn(layers[index][f"{name}.weight"].shape, generator=generator)
        cost = 0.5 * found[index][name].moment @ ((noise @ found[index][name].hessian) * noise).sum(1)
        changed = answers(index, {**layers[index], f"{name}.weight": layers[index][f"{name}.weight"] + noise})
        kl = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="none").sum(-1).mean()
        assert float(cost) == pytest.approx(float(kl), rel=0.35), (index, name)
        assert float(kl) > 1e-5
    # Errors of a head's outputs in the directions that matter least: what hangs together is seen in the blocks alone.
    size, name = config.head_dim, "self_attn.q_proj"
    sensitivity = found[1][name]
    moments = sensitivity.blocks.mean(0)
    assert sensitivity.blocks.shape == (2, config.num_attention_heads, size, size)
    torch.testing.assert_close(moments.diagonal(dim1=1, dim2=2).reshape(-1), sensitivity.moment)
    assert found[1]["self_attn.v_proj"].blocks is None
    weak = torch.linalg.eigh(moments).eigenvectors[:, :, 0]
    noise = 0.5 * weak[:, :, None] * torch.randn(len(weak), 1, config.hidden_size, generator=generator)
    cost = 0.5 * ((moments @ noise @ sensitivity.hessian) * noise).sum()
    noise = noise.reshape(-1, config.hidden_size)
    alone = 0.5 * sensitivity.moment @ ((noise @ sensitivity.hessian) * noise).sum(1)
    changed = answers(1, {**layers[1], f"{name}.weight": layers[1][f"{name}.weight"] + noise})
    kl = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="none").sum(-1).mean()
    assert float(cost) == pytest.approx(float(kl), rel=0.5) and float(alone) > 3 * float(kl)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 29])
def test_round_layer_moves_states_like_a_resumed_conversion(tmp_path: Path, kept_bytes: int) -> None:
    """Bit by bit; and every group sees the inputs that the groups before it, quantized, produce."""
    source = open_source(write_model(tmp_path, AWKWARD))
    config, tensors = source.config, source.layer(0)
    tokens, new, seen = random_tokens(source, 19, 8), {}, {}
    originals = first_states(tokens, source.embedding())
    states = [state + 0.1 * torch.randn(state.shape) for state in originals]
    starts = [[state.clone() for state in both] for both in (states, originals)]

    def quantize(names, hessian, pulls):
        fresh = {n: pack(rtn(tensors[f"{n}.weight"], 4)).weight(*tensors[f"{n}.weight"].shape) for n in names}
        new.update({f"{n}.weight": w for n, w in fresh.items()})
        seen[tuple(names)] = hessian, pulls
        return fresh

    means = round_layer(config, tensors, states, originals, 4, quantize, kept_bytes)
    assert list(seen) == list(GROUPS)
    quantized = {**tensors, **new}
    between: list[Any] = []  # states before each group's outputs are added
    inputs: list[dict[str, Any]] = []
    for t, begun, moved in zip((quantized, tensors), starts, (states, originals)):
        found: dict[str, Any] = {}

        def watch(name, x, t=t, found=found):
            found[name] = x.reshape(-1, x.shape[-1]).double()
            return torch.nn.functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

        rope = rope_table(config, torch.arange(8))
        start = torch.cat(begun)
        layer_forward(config, t, start, rope, linear=watch, r4_block=4)
        inputs.append(found)
        attended = torch.nn.functional.linear(
            found["self_attn.o_proj"], t["self_attn.o_proj.weight"].double(), t["self_attn.o_proj.bias"].double()
        )
        start = start.reshape(-1, config.hidden_size).double()
        between.append((start, start + attended))
        advance(config, t, begun, 4)
        assert all(torch.equal(a, b) for a, b in zip(begun, moved))
    for norm, group in zip(NORMS, GROUPS[::2], strict=True):
        torch.testing.assert_close(means[norm].double(), inputs[0][group[0]].mean(0), rtol=1e-5, atol=1e-6)
    for group, (hessian, pulls) in seen.items():
        x, x0 = (found[group[0]] for found in inputs)
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        lacking = (x0 - x) @ torch.cat([tensors[f"{name}.weight"] for name in group]).double().T
        if group == GROUPS[1]:
            lacking += between[1][0] - between[0][0]
        elif group == GROUPS[3]:
            lacking += between[1][1] - between[0][1]
        # Every batch of 16 sequences gives each half its half: here 8 and 8, then 2 and 1 (12 tokens each).
        first = torch.cat([torch.arange(64), torch.arange(128, 140)])
        second = torch.cat([torch.arange(64, 128), torch.arange(140, 152)])
        for pull, half in zip(pulls, (first, second), strict=True):
            torch.testing.assert_close(pull.double(), lacking[half].T @ x[half] / len(half), rtol=1e-4, atol=1e-4)


def test_hessian_counts_every_token() -> None:
    hessian = Moment(3)
    hessian.add(torch.tensor([[[1.0, 2, 0], [0, 0, 0]]]))
    hessian.add(torch.tensor([[3.0, 0, 0]]))
    torch.testing.assert_close(hessian.mean(), torch.tensor([[10.0, 2, 0], [2, 4, 0], [0, 0, 0]]) / 3)


def test_packed_matrices_come_back(tmp_path: Path) -> None:
    for bits in range(2, 9):
        grid = rtn(torch.randn(37, 21), bits)
        packed = unpack(pack(grid).tensors("x"), "x")
        assert packed.bits == bits and packed.codes.shape == (2, 3, 8 * bits)
        wanted = grid.levels.float()[grid.codes.long()] * grid.scales.float().T
        torch.testing.assert_close(packed.weight(37, 21), wanted)
        assert not packed.scales[:, 37:].any()


def test_comparison_known_answers() -> None:
    same, other = torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    found = Comparison()
    found.add(torch.cat([same, same]), torch.cat([same + 3, other]), torch.tensor([0]))
    result = found.result()
    assert result["mean_kl"] == pytest.approx(0.5 * (0.5 * np.log(2) - 0.25 * np.log(2)))
    assert (result["tokens"], result["top1_agreement"], result["perplexity"]) == (2, 0.5, pytest.approx(2.0))


def test_losses_that_no_model_has() -> None:
    """Their exponentials would not fit a float."""
    scores = torch.tensor([[0.0, 2000.0, 0.0]])
    found = Comparison()
    found.add(torch.zeros(1, 3), scores, torch.tensor([0]))
    with pytest.raises(Error, match="the model's mean loss is 2000 nats a token: the checkpoint is damaged"):
        found.result()
    found = Comparison()
    found.add(scores, scores, torch.tensor([0]))
    with pytest.raises(Error, match="the source's mean loss is 2000 nats a token: its weights are damaged"):
        found.result()
