"""Configurations: every spelling that is read, and what is refused with which words."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from halfturn.converter.architectures import FAMILIES, canonical_config, find_family
from halfturn.error import Error
from shared_data import SHARED, needs_shared
from tiny_sources import LLAMA3, config_of


def test_defaults_of_old_configurations() -> None:
    """Keys that files of 2023 leave out mean multi-head attention, hidden/heads, theta 10000 and no biases."""
    drop = ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings", "hidden_act")
    config = config_of(drop=drop)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 6, 10000.0)
    assert not config.tie_word_embeddings and not config.attention_bias and config.rope_scaling is None


def test_explicit_head_dim_wins_over_hidden_by_heads() -> None:
    assert config_of({"head_dim": 16}).linear_shapes()["self_attn.q_proj"] == (64, 24)


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({"rope_scaling": None}, 10000.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 10000.0, {"rope_type": "dynamic", "factor": 4.0}),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}},
            5e5,
            {"rope_type": "linear", "factor": 8.0},
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            10000.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rope_spellings(given: dict[str, Any], theta: float, scaling: dict[str, Any] | None) -> None:
    config = config_of(given)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            "Qwen2ForCausalLM is not supported: Halfturn converts LlamaForCausalLM",
        ),
        ({"architectures": [], "model_type": "gpt2"}, "gpt2 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
        ({"quantization_config": {"quant_method": "halfturn"}}, "is a Halfturn checkpoint"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' has factor = None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "factor = inf"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0 not above low_freq_factor 1.0"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "only one setting for all layers"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            "two settings that differ; keep the one",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "two settings that differ",
        ),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, which num_key_value_heads = 3 does not divide"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is a number of 1329 bits"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings is 10{15} .* at most 1073741824"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 10{12} .* at most 1024"),
        ({"num_attention_heads": 1000, "head_dim": 200}, "1000 heads of 200 are 200000 values; at most 131072"),
        ({"rope_theta": "abc"}, "rope_theta is 'abc'"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\]"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_theta": 10**400}, "rope_theta is a number of 1329 bits"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.001}}, "factor = 0.001; .* from 1 to 1000000"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope scaling \['linear'\] is not supported"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings = 'x'; it must be a positive number from 1 to 1073741824",
        ),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"bos_token_id": [1, 2]}, r"bos_token_id is \[1, 2\]"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>' .* a token id, a list of them or null"),
        ({"eos_token_id": 2.5}, "eos_token_id is 2.5"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id is \[1, 'x'\]"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false"),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}; it must be a list of names"),
        ({"architectures": [["x"]]}, r"architectures is \[\['x'\]\]; it must be a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; it must be a list of names"),
        ({"architectures": [], "model_type": ["x"]}, r"model_type \['x'\] is not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "64"}, "sliding_window is '64'"),
        (
            {"architectures": ["MistralForCausalLM"], "max_position_embeddings": "x"},
            "max_position_embeddings is 'x'",
        ),
        ({"intermediate_size": None}, "no intermediate_size"),
        ({"model_type": "granite"}, "architectures says LlamaForCausalLM and model_type 'granite'; correct"),
        ({"model_type": ["llama"]}, r"architectures says LlamaForCausalLM and model_type \['llama'\]; correct"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding window of 64 tokens .context 128."),
        ({"is_causal": False}, "is_causal is False; only models that see no later tokens"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "sliding window of 64 tokens .context 128."),
        (
            {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768},
            "sliding window of 4096 tokens .context 32768.",
        ),
    ],
)
def test_refused_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        config_of(changes)


def test_special_tokens_that_are_none() -> None:
    """null is what it says, not a family's default; so are numbers that are no token's."""
    for bos, eos, pad in ((None, None, None), (50, -1, -1), (-1, [None, -1, 50], 50)):
        config = config_of({"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
        assert (config.bos_token_id, config.eos_token_id or None, config.pad_token_id) == (None, None, None)
    assert config_of({"eos_token_id": [2, None, 3]}).eos_token_id == [2, 3]
    assert config_of({"attention_bias": 0}) == config_of({"attention_bias": False})


def test_mistral_without_a_window_is_a_llama() -> None:
    mistral = config_of({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None})
    assert mistral == config_of()
    assert mistral.to_dict()["architectures"] == ["LlamaForCausalLM"]


def test_canonical_configuration_is_a_fixed_point() -> None:
    for config in (config_of({"rope_scaling": LLAMA3, "eos_token_id": [1, 2]}), config_of({"attention_bias": True})):
        again = config.to_dict()
        assert canonical_config(again, find_family(again)) == config


@needs_shared
def test_published_configurations() -> None:
    """Llama-family shapes are read with the right number of weights; Qwen and the windowed Mistral are refused."""
    millions = {
        "llama-2-7b-chat-hf": 6738.4,
        "mlc_llama2_13b": 13015.9,
        "mlc_llama3_1_8b": 8030.3,
        "mlc_llama3_2_1b": 1235.8,
        "mlc_llama3_2_3b": 3212.7,
        "mlc_mistral_7b_v03": 7248.0,
        "mlc_smollm2_135m": 134.5,
        "mlc_smollm_1_7b": 1711.4,
        "mlc_tinyllama_1b_chat_v1.0": 1100.0,
    }
    read = 0
    for path in sorted((SHARED / "configs").glob("*.json")):
        keys = json.loads(path.read_text())
        if keys["architectures"][0] not in FAMILIES or path.stem == "mlc_mistral_7b":
            with pytest.raises(Error, match=r"Qwen|sliding window"):
                canonical_config(keys, find_family(keys))
            continue
        config = canonical_config(keys, find_family(keys))
        read += 1
        if path.stem in millions:
            assert config.parameters() / 1e6 == pytest.approx(millions[path.stem], abs=0.06), path.stem
    assert read >= 13
