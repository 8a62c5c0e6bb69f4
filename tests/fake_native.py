"""A native engine in plain Python, so that scheduling, streaming and serving are tested without the compiled one.

`fake_native` stands for the module `halfturn._C`: it has Model, Item and Sampler. A KV slot holds a hash of its token
and of the slot before it, found through the page table; the next token is a hash of every slot that the page table
reaches. So a wrong page, a lost token or a page in use by two requests gives other tokens, or an error.
"""

from __future__ import annotations

import json
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfturn.error import Error

UNWRITTEN = 0xFFFFFFFF
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools|tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}(){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Sampler:
    """Deterministic: the token depends on the hash, the seed where temperature is above 0, and the tokens accepted."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int = -1
    banned: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted: list[int] = []  # the prompt, then what was drawn
        self.drawn = 0

    @property
    def remembers(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def accept(self, tokens: list[int]) -> None:
        self.accepted.extend(tokens)

    def ban(self, tokens: list[int]) -> None:
        self.banned = list(tokens)

    def draw(self, value: int, vocab_size: int) -> int:
        if self.temperature > 0:
            value = zlib.crc32(b"%d %d %d" % (self.seed, self.drawn, value))
        if self.remembers:
            value = zlib.crc32(array("I", self.accepted).tobytes(), value)
        token = value % vocab_size
        best = max(self.logit_bias, key=lambda t: self.logit_bias[t], default=None)
        if best is not None and self.logit_bias[best] >= 100:
            token = best
        while token in self.banned or self.logit_bias.get(token, 0) <= -100:
            token = (token + 1) % vocab_size
        return token


@dataclass
class Item:
    tokens: list[int]
    position: int
    pages: list[int]
    sampler: Sampler | None = None
    prompt: bool = False


@dataclass
class Sample:
    token: int
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)


class Model:
    """The native Model's step and logits over `pages` pages of `page_size` tokens.

    `script(tokens, drawn)` decides the token instead of the hash where it's given: `tokens` are all that the page table
    reaches, `drawn` counts what this request has drawn. `fail(step, items)` may raise. `step_seconds` is slept a step.
    With `overlap_rows` it has steps in halves, as a card does, with `decodes_apart` other values for what was drawn.
    """

    def __init__(
        self,
        vocab_size: int = 300,
        context: int = 256,
        pages: int = 64,
        page_size: int = 32,
        script: Callable[[list[int], int], int] | None = None,
        fail: Callable[[int, Sequence[Item]], None] | None = None,
        step_seconds: float = 0.0,
        overlap_rows: int = 0,
        decodes_apart: bool = False,
    ) -> None:
        self.vocab_size, self.context, self.pages, self.page_size = vocab_size, context, pages, page_size
        self.threads, self.isa, self.mode, self.weight_bytes = 1, "fake", "a8", 1000
        self.device, self.device_name, self.step_rows = "cpu", "cpu", 512
        self.decodes_apart = decodes_apart
        self.script, self.fail, self.step_seconds = script, fail, step_seconds
        self.overlap_rows = overlap_rows
        self.under_way: list[tuple[list[Item], list[Sample | None] | Exception]] = []
        self.values = array("I", [UNWRITTEN]) * (pages * page_size)
        self.tokens = array("I", [0]) * (pages * page_size)
        self.steps = 0
        self.batches: list[list[int]] = []  # new tokens of each item, per step

    def read_bandwidth(self, megabytes: int) -> float:
        return 1e9

    def memory(self) -> dict[str, int]:
        return {"weights": 1000, "kv_cache": 8 * len(self.values), "workspace": 0}

    def step(self, items: Sequence[Item]) -> list[Sample | None]:
        self.steps += 1
        self.batches.append([len(item.tokens) for item in items])
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.fail is not None:
            self.fail(self.steps, items)
        self._check(items)
        return [self._sample(item, *self._write(item)) for item in items]

    def start(self, items: Sequence[Item]) -> None:
        """Runs the step at once, as the card does in the order of starts; finish() tells what came of it."""
        assert len(items) <= self.overlap_rows and len(self.under_way) < 2
        given: list[Item] = []
        for item in items:
            assert item.sampler is not None and len(item.tokens) <= 1 and not item.prompt
            if not item.tokens:
                assert not item.sampler.remembers
                before, samples = self.under_way[-1]
                row = [i.sampler for i in before].index(item.sampler)
                sample = samples[row] if isinstance(samples, list) else None
                item = Item([sample.token if sample is not None else 0], item.position, item.pages, item.sampler)
            given.append(item)
        try:
            self.under_way.append((given, self.step(given)))
        except Exception as error:
            self.under_way.append((given, error))

    def finish(self) -> list[Sample | None]:
        _, samples = self.under_way.pop(0)
        if isinstance(samples, Exception):
            raise samples
        return samples

    def logits(self, items: Sequence[Item]) -> Any:
        import numpy as np

        self._check(items)
        rows = []
        for item in items:
            for i, token in enumerate(item.tokens):
                values, seen = self._write(Item([token], item.position + i, item.pages))
                rows.append(np.zeros(self.vocab_size, np.float32))
                rows[-1][self._next(values, seen, 0)] = 10.0
        return np.stack(rows)

    def _check(self, items: Sequence[Item]) -> None:
        if not items:
            raise Error("a step has no items")
        written: dict[int, int] = {}
        for n, item in enumerate(items):
            end = item.position + len(item.tokens)
            if not item.tokens or item.position < 0 or end > self.context:
                raise Error(f"item {n} covers positions {item.position}..{end}, the context holds {self.context}")
            if len(item.pages) * self.page_size < end:
                raise Error(f"item {n} ends at position {end}, its {len(item.pages)} pages are too few")
            if len(set(item.pages)) != len(item.pages) or not all(0 <= p < self.pages for p in item.pages):
                raise Error(f"item {n} has a bad page table: {item.pages}")
            if not all(0 <= t < self.vocab_size for t in item.tokens):
                raise Error(f"item {n} has a token outside 0..{self.vocab_size - 1}")
            for page in item.pages[item.position // self.page_size : (end - 1) // self.page_size + 1]:
                written[page] = n
        for n, item in enumerate(items):
            if any(written.get(page, n) != n for page in item.pages):
                raise Error(f"item {n} reads or writes a page that another item of the step writes")

    def _write(self, item: Item) -> tuple[array[int], list[int]]:
        size, table = self.page_size, item.pages
        before = 0
        if item.position:
            last = item.position - 1
            before = self.values[table[last // size] * size + last % size]
            if before == UNWRITTEN:
                raise Error(f"position {last} was never written")
        for i, token in enumerate(item.tokens, start=item.position):
            slot = table[i // size] * size + i % size
            apart = self.decodes_apart and not item.prompt
            before = zlib.crc32(b"%d %d %d" % (i, token, before), apart) & 0x7FFFFFFF
            self.values[slot], self.tokens[slot] = before, token
        end = item.position + len(item.tokens)
        values, tokens = array("I"), array("I")
        for i in range((end + size - 1) // size):
            slot, count = table[i] * size, min(size, end - i * size)
            values.extend(self.values[slot : slot + count])
            tokens.extend(self.tokens[slot : slot + count])
        return values, list(tokens) if self.script else []

    def _next(self, values: array[int], seen: list[int], drawn: int) -> int:
        return self.script(seen, drawn) if self.script else zlib.crc32(values.tobytes()) % self.vocab_size

    def _sample(self, item: Item, values: array[int], seen: list[int]) -> Sample | None:
        sampler = item.sampler
        if sampler is None:
            return None
        if self.script is not None:
            token = self.script(seen, sampler.drawn)
            while token in sampler.banned:
                token = (token + 1) % self.vocab_size
        else:
            token = sampler.draw(zlib.crc32(values.tobytes()), self.vocab_size)
        sampler.drawn += 1
        sampler.accepted.append(token)
        if sampler.logprobs < 0:
            return Sample(token)
        others = [(token + i) % self.vocab_size for i in range(sampler.logprobs)]
        return Sample(token, -0.5, [(t, -0.5 - i) for i, t in enumerate(others)])


def expected(prompt: Sequence[int], count: int, vocab_size: int = 300, apart: bool = False) -> list[int]:
    """The greedy continuation of `prompt` by the hash: the slow, obvious version without pages."""
    tokens, values, before = list(prompt), array("I"), 0
    for n in range(len(prompt) + count):
        if n >= len(prompt):
            tokens.append(zlib.crc32(values.tobytes()) % vocab_size)
        before = zlib.crc32(b"%d %d %d" % (n, tokens[n], before), apart and n >= len(prompt)) & 0x7FFFFFFF
        values.append(before)
    return tokens[len(prompt) :]


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Path:
    """A byte-level tokenizer of 256 bytes and 3 specials (<|bos|> 256, <|im_start|> 257, <|im_end|> 258 = EOS)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "eos_token_id": 258}))
    return folder


def load(folder: Path, reply: str | bytes | None = None, **settings: Any) -> Any:
    """A halfturn.Model on the fake engine, with `write_tokenizer`'s tokenizer in `folder`.

    Every request is answered with the text `reply` and the end of text; without `reply`, with the hash's tokens.
    """
    import sys

    from halfturn.model import Model as HalfturnModel
    from halfturn.tokenizer import Tokenizer

    write_tokenizer(folder)
    if reply is not None:
        tokenizer = Tokenizer.from_folder(folder)
        units = [reply[i : i + 1] for i in range(len(reply))] if isinstance(reply, bytes) else []
        ids = [BYTE_IDS[unit[0]] for unit in units] if units else tokenizer.encode(str(reply))
        settings["script"] = lambda tokens, drawn: ids[drawn] if drawn < len(ids) else 258
    native = Model(**settings)
    return HalfturnModel(folder, json.loads((folder / "config.json").read_text()), native, sys.modules[__name__])


def _byte_ids() -> list[int]:
    """The token of each byte in `write_tokenizer`'s vocabulary (GPT-2's printable stand-ins for bytes, sorted)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [b for b in range(256) if b not in plain]
    stand_in = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(extra)}
    order = {c: i for i, c in enumerate(sorted(stand_in.values()))}
    return [order[stand_in[b]] for b in range(256)]


BYTE_IDS = _byte_ids()
