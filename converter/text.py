"""The tokens that a conversion calibrates on and is judged by: sampled from the model itself, or read from files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from halfturn.converter.architectures import ModelConfig
from halfturn.converter.checkpoint import Source
from halfturn.converter.llama import Cache, layer_forward, logits, rope_table
from halfturn.converter.work import WorkFolder
from halfturn.error import Error
from halfturn.machine import available_memory

CONTEXT = 256  # tokens of a calibration sequence
HELD_OUT = (16, 256)  # sequences and tokens that the result is judged by

Report = Callable[[int, int], None]  # (done, total)


class Texts:
    """A conversion's two texts, kept in its work folder under `machine` and what else decides them."""

    def __init__(
        self,
        source: Source,
        work: WorkFolder,
        machine: Mapping[str, Any],
        report: Callable[[str, int, int], None],
        files: Sequence[str],
        tokens: int,
        seed: int,
    ) -> None:
        """files: the texts to read; none for text that the model samples itself, from `seed`."""
        self._source, self._work, self._machine, self._report = source, work, machine, report
        self._files, self._tokens, self._seed = files, tokens, seed

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the calibration text depends on."""
        files = [hashlib.sha256(data).hexdigest() for data in self._contents]
        return {**self._machine, "seed": self._seed, "files": files, "tokens": [self._tokens, CONTEXT]}

    @cached_property
    def _contents(self) -> list[bytes]:
        """The files' bytes, read once: a pipe can't be read again."""
        return [read_file(file) for file in self._files]

    @cached_property
    def calibration(self) -> Tensor:
        """Tokens [sequences, length]."""
        if self._files:
            return self._windows[0]
        length = self._length(CONTEXT)
        count = max(1, -(-self._tokens // length))
        return self._sample("calibration text", self.key, count, length, 2 * self._seed)

    @cached_property
    def held_out(self) -> Tensor:
        """Tokens that no statistic has seen [sequences, length], of the same kind as the calibration text."""
        if self._files:
            return self._windows[1]
        count, length = HELD_OUT
        length = self._length(length)
        key = {**self._machine, "held_out": [count, length, self._seed]}
        return self._sample("held-out text", key, count, length, 2 * self._seed + 1)

    @cached_property
    def _windows(self) -> tuple[Tensor, Tensor]:
        """The files' windows, one in nine of them held out."""
        length = self._length(CONTEXT)
        texts = [decode(data, file) for data, file in zip(self._contents, self._files)]
        windows = read_texts(self._source, texts, self._tokens + max(self._tokens // 8, length), length)
        judged = torch.zeros(len(windows), dtype=torch.bool)
        judged[4::9] = True
        judged[-1] |= not judged.any()
        return windows[~judged], windows[judged]

    def _length(self, most: int) -> int:
        return min(most, self._source.config.max_position_embeddings)

    def _sample(self, stage: str, key: dict[str, Any], count: int, length: int, seed: int) -> Tensor:
        found = self._work.get("text", key)
        if found is None:
            tokens = sample_text(self._source, count, length, seed, lambda d, t: self._report(stage, d, t))
            self._work.put("text", key, {"tokens": tokens})
            return tokens
        return found[0]["tokens"]


def sample_text(
    source: Source, sequences: int, length: int, seed: int, report: Report = lambda done, total: None
) -> Tensor:
    """Tokens [sequences, length] int64 that the model writes at temperature 1, all sequences at once.

    Every second sequence starts with BOS, the others with a random token, and so does what follows an end of text. The
    whole model is in memory while it writes, in bfloat16 where the CPU computes with it. Raises Error where it doesn't
    fit.
    """
    config = source.config
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    cache_bytes = 2 * sequences * length * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    needed = (config.parameters() + cache_bytes) * dtype.itemsize
    if needed > available_memory():
        raise Error(
            f"the model needs {needed / 1e9:.1f} GB of memory to write its own calibration text, "
            f"{available_memory() / 1e9:.1f} GB are available: give text of yours with --calibration FILE"
        )
    layers = [{name: t.to(dtype) for name, t in source.layer(i).items()} for i in range(config.num_hidden_layers)]
    embedding, norm = source.embedding().to(dtype), source.final_norm().to(dtype)
    head = embedding if config.tie_word_embeddings else source.head().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    caches = [Cache(config, sequences, length, dtype) for _ in layers]
    ends = end_tokens(config)
    tokens = torch.randint(config.vocab_size, (sequences, length), generator=generator)
    if config.bos_token_id is not None:
        tokens[::2, 0] = config.bos_token_id
    with torch.inference_mode():
        for position in range(length - 1):
            current = tokens[:, position : position + 1]
            rope = rope_table(config, torch.tensor([position]))
            hidden = torch.nn.functional.embedding(current, embedding)
            for tensors, cache in zip(layers, caches):
                hidden = layer_forward(config, tensors, hidden, rope, cache)
            drawn = draw(logits(config, hidden[:, 0], norm, head).float(), generator)
            ended = torch.isin(current[:, 0], ends)
            tokens[:, position + 1] = torch.where(ended, tokens[:, position + 1], drawn)
            report(position + 1, length - 1)
    return tokens


def draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One token [rows] from each row's softmax(scores [rows, vocab]), by inverting the cumulative distribution."""
    cumulative = scores.softmax(-1).cumsum(-1)
    where = torch.rand(len(scores), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, where, right=True)[:, 0].clamp(max=scores.shape[1] - 1)


def read_file(path: str | Path) -> bytes:
    """All of a file or pipe. Raises Error where it can't be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Error(f"{path} can't be read: {error.strerror}") from None


def decode(data: bytes, path: str | Path) -> str:
    """A file's text as it is, its line ends kept. Raises Error where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Error(f"{path} is not UTF-8 text: byte {error.start} can't be decoded, convert the file first") from None


def read_texts(source: Source, texts: Sequence[str], tokens: int, length: int) -> Tensor:
    """About `tokens` tokens of the texts as windows [windows, length], spread evenly over all of them.

    Each text is tokenized once, without BOS. Raises Error where they hold fewer than two windows.
    """
    from halfturn.tokenizer import Tokenizer

    with TemporaryDirectory() as folder:
        source.copy_tokenizer(folder)
        tokenizer = Tokenizer.from_folder(folder)
        ids = [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    whole = torch.cat([part[: len(part) // length * length].long().view(-1, length) for part in ids])
    if len(whole) < 2:
        raise Error(
            f"the calibration files hold {sum(map(len, ids))} tokens: at least two windows of {length} are needed"
        )
    if int(whole.max()) >= source.config.vocab_size:
        raise Error(f"the tokenizer gives token {int(whole.max())}, the model has {source.config.vocab_size}")
    count = min(max(tokens // length, 2), len(whole))
    return whole[torch.linspace(0, len(whole) - 1, count).round().long()]


def end_tokens(config: ModelConfig) -> Tensor:
    """The tokens that end a text, int64."""
    ends = config.eos_token_id
    return torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else ends, dtype=torch.int64)


def has_bfloat16() -> bool:
    """Whether products of bfloat16 are faster here than those of float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
