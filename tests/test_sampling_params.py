"""SamplingParams: every refusal names the field, its value and the range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from halfturn.error import Error
from halfturn.sampling import MAX_SEED, SamplingParams

GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1, "min_tokens": 1, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 1, "seed": MAX_SEED},
    {"logit_bias": {0: -100, 99: 100.0}, "stop": ["a", "b"], "stop_token_ids": [0, 99], "logprobs": 20},
    {"stop": "x", "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.1, "ignore_eos": True},
    {"max_tokens": np.int64(3), "top_k": np.uint8(3), "seed": np.int32(1), "top_p": np.float32(0.5)},
    {"logit_bias": {np.int64(5): np.float16(1)}, "temperature": np.float64(0.7), "logprobs": np.int8(2)},
]
BAD: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", 1.5, "a whole number"),
    ("max_tokens", True, "a whole number"),
    ("max_tokens", np.float32(2), "a whole number"),
    ("max_tokens", np.True_, "a whole number"),
    ("min_tokens", -1, "at least 0"),
    ("temperature", -0.1, "from 0.0 to 100.0"),
    ("temperature", float("nan"), "a number"),
    ("temperature", float("inf"), "a number"),
    ("temperature", np.float32("nan"), "a number"),
    ("temperature", "hot", "a number"),
    ("top_k", -1, "at least 0"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.01, "above 0 and at most 1"),
    ("min_p", 2, "from 0.0 to 1.0"),
    ("repetition_penalty", 0, "above 0 and at most 100"),
    ("presence_penalty", 2.5, "from -2.0 to 2.0"),
    ("frequency_penalty", -3, "from -2.0 to 2.0"),
    ("logit_bias", {100: 1}, "from 0 to 99"),
    ("logit_bias", {1: 101}, "from -100.0 to 100.0"),
    ("logit_bias", [1], "must map token ids"),
    ("seed", -1, f"from 0 to {MAX_SEED}"),
    ("seed", MAX_SEED + 1, f"from 0 to {MAX_SEED}"),
    ("stop", [""], "at least one character"),
    ("stop", [3], "must be a string"),
    ("stop", 3, "a string or a list"),
    ("stop", ["x"] * 65, "at most 64"),
    ("stop_token_ids", [100], "from 0 to 99"),
    ("stop_token_ids", 5, "a list of token ids"),
    ("ignore_eos", 1, "true or false"),
    ("logprobs", 21, "from 0 to 20"),
]


@pytest.mark.parametrize("settings", GOOD)
def test_good_settings(settings: dict[str, Any]) -> None:
    SamplingParams(**settings).validate(100)


@pytest.mark.parametrize(("field", "value", "allowed"), BAD)
def test_bad_settings(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(Error) as error:
        SamplingParams(**{field: value}).validate(100)
    assert field in str(error.value) and allowed in str(error.value)


def test_more_tokens_at_least_than_at_most() -> None:
    with pytest.raises(Error, match="min_tokens is 5: it must be a whole number, from 0 to 4"):
        SamplingParams(max_tokens=4, min_tokens=5).validate(100)


def test_stop_is_one_or_many() -> None:
    assert SamplingParams(stop="ab").stops == ("ab",) and SamplingParams(stop=["a", "b"]).stops == ("a", "b")
