"""The plain torch forward against a slow one in numpy float64, and against what a real model is known to say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfturn.converter.checkpoint import Source, open_source
from random_models import AWKWARD, logits_of, open_model, random_tokens
from shared_data import STORIES, needs_stories
from tiny_sources import LLAMA3, config_of, torch

from halfturn.converter.llama import (  # isort: skip
    Cache,
    fast_products,
    inverse_frequencies,
    layer_forward,
    logits,
    rope_table,
)


def slow_frequencies(config: Any, length: int) -> np.ndarray:
    """One frequency at a time, from the papers' formulas."""
    d, scaling = config.head_dim, config.rope_scaling or {"rope_type": "none"}
    theta, kind = config.rope_theta, scaling["rope_type"]
    if kind == "dynamic" and length > config.max_position_embeddings:
        stretch = scaling["factor"] * length / config.max_position_embeddings - (scaling["factor"] - 1)
        theta *= stretch ** (d / (d - 2))
    found = []
    for i in range(d // 2):
        f = theta ** (-2 * i / d)
        if kind == "linear":
            f /= scaling["factor"]
        elif kind == "llama3":
            wavelength, old = 2 * math.pi / f, scaling["original_max_position_embeddings"]
            if wavelength > old / scaling["low_freq_factor"]:
                f /= scaling["factor"]
            elif wavelength >= old / scaling["high_freq_factor"]:
                smooth = (old / wavelength - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                f = (1 - smooth) * f / scaling["factor"] + smooth * f
        found.append(f)
    return np.array(found)


def slow_logits(source: Source, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab], one position, head and pair at a time."""
    c = source.config
    frequencies = slow_frequencies(c, len(tokens))

    def norm(x: np.ndarray, weight: Any) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + c.rms_norm_eps) * weight.numpy().astype(np.float64)

    def linear(tensors: dict[str, Any], name: str, x: np.ndarray) -> np.ndarray:
        y = tensors[f"{name}.weight"].numpy().astype(np.float64) @ x
        return y + tensors[f"{name}.bias"].numpy() if f"{name}.bias" in tensors else y

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        y, half = x.reshape(-1, c.head_dim).copy(), c.head_dim // 2
        for head in range(len(y)):
            for i in range(half):
                angle = position * frequencies[i]
                a, b = y[head, i], y[head, i + half]
                y[head, i] = a * math.cos(angle) - b * math.sin(angle)
                y[head, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return y

    states = [source.embedding()[t].numpy().astype(np.float64) for t in tokens]
    for index in range(c.num_hidden_layers):
        t = source.layer(index)
        keys, values = [], []
        for position, h in enumerate(states):
            x = norm(h, t["input_layernorm.weight"])
            q = rotate(linear(t, "self_attn.q_proj", x), position)
            keys.append(rotate(linear(t, "self_attn.k_proj", x), position))
            values.append(linear(t, "self_attn.v_proj", x).reshape(-1, c.head_dim))
            out = []
            for head in range(c.num_attention_heads):
                kv = head * c.num_key_value_heads // c.num_attention_heads
                scores = np.array([q[head] @ k[kv] for k in keys]) / math.sqrt(c.head_dim)
                p = np.exp(scores - scores.max())
                out.append(sum(w * v[kv] for w, v in zip(p / p.sum(), values)))
            h = h + linear(t, "self_attn.o_proj", np.concatenate(out))
            x = norm(h, t["post_attention_layernorm.weight"])
            gate = linear(t, "mlp.gate_proj", x)
            states[position] = h + linear(t, "mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(t, "mlp.up_proj", x))
    head = source.head().numpy().astype(np.float64)
    return np.stack([head @ norm(h, source.final_norm()) for h in states])


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {**LLAMA3, "original_max_position_embeddings": 32},
]


def test_dynamic_scaling_of_heads_of_two() -> None:
    """Their one frequency is 1 whatever the base."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    config = config_of({"head_dim": 2, "max_position_embeddings": 4, "rope_scaling": scaling})
    assert inverse_frequencies(config, 9).tolist() == [1.0]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"] if s else "none")
def test_against_a_slow_forward(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    source = open_model(tmp_path, {**AWKWARD, "rope_scaling": scaling, "max_position_embeddings": 12})
    tokens = random_tokens(source, 2, 20)  # longer than 12 positions, so that "dynamic" has something to do
    got = logits_of(source, tokens)
    for row, window in zip(got, tokens):
        wanted = slow_logits(source, window.tolist())
        assert np.abs(row.numpy() - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_one_head_no_bias_tied(tmp_path: Path) -> None:
    changes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True}
    source = open_model(tmp_path, changes)
    tokens = random_tokens(source, 1, 9)
    wanted = slow_logits(source, tokens[0].tolist())
    np.testing.assert_allclose(logits_of(source, tokens)[0].numpy(), wanted, rtol=1e-3, atol=1e-4 * wanted.std())


def test_llama3_frequencies_known_answers(tmp_path: Path) -> None:
    """Llama 3.1's own: short wavelengths as they were, long ones slowed eight times."""
    changes = {"head_dim": 128, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "num_hidden_layers": 1}
    config = open_model(tmp_path, changes).config
    got = inverse_frequencies(config, 10)
    plain = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert got[0] == 1
    torch.testing.assert_close(got[:29].double(), plain[:29], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[35:].double(), plain[35:] / 8, rtol=1e-5, atol=0)
    assert bool((got[29:35] < plain[29:35]).all() and (got[29:35] > plain[29:35] / 8).all())


def test_cached_steps_equal_the_whole(tmp_path: Path) -> None:
    source = open_model(tmp_path, AWKWARD)
    config = source.config
    tokens = random_tokens(source, 3, 14)
    whole = logits_of(source, tokens)
    layers = [source.layer(i) for i in range(config.num_hidden_layers)]
    caches = [Cache(config, 3, 14, torch.float32) for _ in layers]
    parts, start = [], 0
    for length in (5, 1, 1, 4, 3):  # prompts, single steps and chunks after them
        rope = rope_table(config, torch.arange(start, start + length))
        hidden = source.embedding()[tokens[:, start : start + length]]
        for tensors, cache in zip(layers, caches):
            hidden = layer_forward(config, tensors, hidden, rope, cache)
        parts.append(logits(config, hidden, source.final_norm(), source.head()))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@needs_stories
def test_stories_begins_as_it_is_known_to() -> None:
    from halfturn.tokenizer import Tokenizer

    source, tokens = open_source(STORIES), [1]
    for _ in range(24):
        tokens.append(int(logits_of(source, torch.tensor([tokens]))[0, -1].argmax()))
    text = Tokenizer.from_folder(STORIES).decode(tokens)
    assert text.strip().startswith("Once upon a time, there was a little girl named Lily. She loved to play")


def test_fast_products_are_close_and_undone() -> None:
    x, w = torch.randn(64, 256), torch.randn(96, 256)
    exact = x @ w.T
    with fast_products():
        fast = x @ w.T
        with fast_products(False):
            assert torch.equal(x @ w.T, exact)
    assert torch.equal(x @ w.T, exact)
    assert float((fast - exact).norm() / exact.norm()) < 0.01
