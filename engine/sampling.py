"""What a request asks for: how tokens are drawn, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfturn.checks import check_number, check_whole
from halfturn.error import Error, quoted

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one request. The defaults draw from the model's own distribution until it ends by itself.

    Filters apply in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.
    """

    max_tokens: int | None = None  # None: until the context is full
    min_tokens: int = 0  # no end of text, stop token or stop string before this many tokens
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: fresh randomness
    stop: Sequence[str] | str = ()  # text that ends the answer; not part of it. "": none
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False  # end-of-text tokens are never drawn
    logprobs: int | None = None  # natural log, of the raw logits: None off, n for the drawn token and the n best

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop)

    def validate(self, vocab_size: int) -> None:
        """Raises Error that names the field, its value and the range that is allowed."""
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, 1, None)
        check_whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_whole("top_k", self.top_k, 0, None)
        check_number("top_p", self.top_p, 0.0, 1.0, above=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not isinstance(self.logit_bias, Mapping):
            raise Error(f"logit_bias is {quoted(self.logit_bias)}: it must map token ids to numbers from -100 to 100")
        for token, bias in self.logit_bias.items():
            check_whole("a token id in logit_bias", token, 0, vocab_size - 1)
            check_number(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, MAX_SEED)
        self._validate_stops(vocab_size)
        if not isinstance(self.ignore_eos, bool):
            raise Error(f"ignore_eos is {quoted(self.ignore_eos)}: it must be true or false")
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, min(MAX_LOGPROBS, vocab_size))

    def _validate_stops(self, vocab_size: int) -> None:
        if not isinstance(self.stop, (str, list, tuple)):
            raise Error(f"stop is {quoted(self.stop)}: it must be a string or a list of strings")
        stops: tuple[Any, ...] = self.stops
        if len(stops) > MAX_STOPS:
            raise Error(f"stop has {len(stops)} strings: at most {MAX_STOPS} are allowed")
        for text in stops:
            if not isinstance(text, str) or not text:
                raise Error(f"stop holds {quoted(text)}: each stop must be a string of at least one character")
        if not isinstance(self.stop_token_ids, (list, tuple, set, frozenset)):
            raise Error(f"stop_token_ids is {quoted(self.stop_token_ids)}: it must be a list of token ids")
        for token in self.stop_token_ids:
            check_whole("a token id in stop_token_ids", token, 0, vocab_size - 1)


def default_params(generation_config: Mapping[str, Any], **fallbacks: float) -> SamplingParams:
    """What generation_config.json says about sampling, greedy where do_sample is false; else `fallbacks`."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams(**fallbacks | given)
