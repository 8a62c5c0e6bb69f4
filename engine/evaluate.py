"""Perplexity of a text under a model, by the convention that papers on quantization use.

The text is tokenized once, without BOS; cut into windows of `context` tokens that do not overlap (a last, incomplete
one is dropped); every window predicts its tokens 2..context from those before them in the same window. Perplexity is
exp(mean negative log probability) over all predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halfturn.error import Error

if TYPE_CHECKING:
    from halfturn.model import Model


# A uniform guess over a million tokens costs 14 nats; a mean loss near the end of float64's exp is no model.
MAX_LOSS = 700.0


class Encoder(Protocol):
    """The part of a tokenizer that an evaluation needs."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...


def read_text(path: str | Path, wikitext_join: bool = False) -> str:
    """A UTF-8 file as it is, its line ends kept.

    `wikitext_join` rebuilds what `"\\n\\n".join(dataset["text"])` gives for the WikiText rows that the raw file holds
    one a line: blank rows are empty, others keep their newline. Published WikiText-2 numbers (GPTQ, AWQ and others)
    are of that text, which is about 1% longer in tokens than the file.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Error(f"{path} is not UTF-8 text: byte {error.start} can't be decoded, convert the file first") from None
    except OSError as error:
        raise Error(f"{path} can't be read: {error.strerror}") from None
    if wikitext_join:
        rows = text.split("\n")
        if not rows[-1]:
            rows.pop()
        text = "\n\n".join(row + "\n" if row.strip() else "" for row in rows)
    return text


def windows(tokenizer: Encoder, text: str, context: int, count: int | None = None) -> list[list[int]]:
    """The first `count` (None: all) windows of `context` tokens of `text`, tokenized once and without BOS."""
    if context < 2:
        raise Error(f"a window of {context} tokens predicts nothing: --context must be at least 2")
    if count is not None and count < 1:
        raise Error(f"{count} windows can't be evaluated: --windows must be at least 1")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = len(tokens) // context
    if not whole:
        raise Error(
            f"the text has {len(tokens)} tokens, one window takes {context}: give a longer text or a smaller --context"
        )
    return [tokens[i * context : (i + 1) * context] for i in range(min(whole, count or whole))]


def perplexity(
    model: Model,
    text: str,
    context: int = 2048,
    count: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """{"perplexity", "tokens" (predictions), "windows", "context"} of `text`.

    `progress(done, total, perplexity so far)` is called after every window. The model must have no generator.
    """
    import numpy as np

    if context > model.context:
        raise Error(
            f"windows of {context} tokens don't fit a context of {model.context}: load the model with context={context}"
        )
    pieces = windows(model.tokenizer, text, context, count)
    pages = list(range(-(-context // model.native.page_size)))
    total = 0.0
    for done, tokens in enumerate(pieces, 1):
        with model.lease:  # it writes pages of the KV cache, which a generator may share
            losses = np.asarray(model.native.nll([model.backend.Item(tokens, 0, pages, None)]), dtype=np.float64)
        if losses.shape != (context - 1,):
            raise Error(f"the engine returned {losses.size} losses for a window of {context} tokens")
        total += float(losses.sum())
        mean = total / (done * (context - 1))
        if not mean < MAX_LOSS:
            raise Error(f"the mean loss after window {done} is {mean} nats a token: the checkpoint is damaged")
        if progress:
            progress(done, len(pieces), math.exp(mean))
    return {
        "perplexity": math.exp(mean),
        "tokens": len(pieces) * (context - 1),
        "windows": len(pieces),
        "context": context,
    }
