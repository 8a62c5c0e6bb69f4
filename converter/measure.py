"""How far a quantized model is from its source: KL divergence, perplexities and agreement, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfturn.converter.checkpoint import Source, open_source
from halfturn.converter.llama import final_states, logits
from halfturn.error import Error
from halfturn.evaluate import MAX_LOSS

if TYPE_CHECKING:
    from halfturn.model import Model

ROWS = 256  # positions whose logits are in memory together


@dataclass
class Comparison:
    """Sums over positions; KL(reference || model) in nats.

    Every position counts for KL and top-1, all but the last of a window for the perplexities.
    """

    tokens: int = 0
    predictions: int = 0
    kl: float = 0.0
    agreed: int = 0
    reference_loss: float = 0.0
    model_loss: float = 0.0

    def add(self, reference: Tensor, model: Tensor, following: Tensor) -> None:
        """Logits [rows, vocab] float32 of both, and the tokens that follow the first of these rows (rows or fewer)."""
        if reference.shape != model.shape:
            raise Error(f"the reference's logits are {list(reference.shape)}, the model's {list(model.shape)}")
        p, q = reference.log_softmax(-1), model.log_softmax(-1)
        self.tokens += len(p)
        self.kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        at = following[:, None]
        self.predictions += len(at)
        self.reference_loss -= float(p[: len(at)].gather(1, at).sum())
        self.model_loss -= float(q[: len(at)].gather(1, at).sum())

    def result(self) -> dict[str, Any]:
        """mean_kl (nats a token), perplexity, reference_perplexity, perplexity_ratio, top1_agreement, tokens."""
        if not math.isfinite(self.kl) or not math.isfinite(self.model_loss):
            raise Error("the model's logits are not finite: the checkpoint is damaged")
        reference, model = (loss / max(self.predictions, 1) for loss in (self.reference_loss, self.model_loss))
        for whose, loss, damaged in (("source", reference, "its weights are"), ("model", model, "the checkpoint is")):
            if not loss < MAX_LOSS:
                raise Error(f"the {whose}'s mean loss is {loss:.0f} nats a token: {damaged} damaged, start from others")
        return {
            "mean_kl": max(self.kl / self.tokens, 0.0),
            "perplexity": math.exp(model),
            "reference_perplexity": math.exp(reference),
            "perplexity_ratio": math.exp(model - reference),
            "top1_agreement": self.agreed / self.tokens,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def reference_states(source: Source, tokens: Tensor, report: Callable[[int, int], None] = lambda d, t: None) -> Tensor:
    """The source's states after its last layer [windows, length, hidden], exact float32, one layer in memory."""

    def layers() -> Iterator[Mapping[str, Tensor]]:
        for index in range(source.config.num_hidden_layers):
            yield source.layer(index)
            report(index + 1, source.config.num_hidden_layers)

    return final_states(source.config, source.embedding(), layers(), tokens)


@torch.inference_mode()
def compare_states(
    source: Source, reference: Tensor, model: Tensor, model_head: Tensor, tokens: Tensor
) -> dict[str, Any]:
    """Compares final states [windows, length, hidden] of the source with those of a quantized model (norm folded)."""
    config, found = source.config, Comparison()
    norm, head, ones = source.final_norm(), source.head(), torch.ones(source.config.hidden_size)
    for wanted, got, window in zip(reference, model, tokens):
        for start in range(0, len(window), ROWS):
            rows = slice(start, start + ROWS)
            found.add(
                logits(config, wanted[rows], norm, head),
                logits(config, got[rows], ones, model_head),
                window[start + 1 : start + 1 + ROWS],
            )
    return found.result()


@torch.inference_mode()
def evaluate_kl(
    model: Model,
    reference: str | Path,
    text: str | None,
    context: int,
    count: int | None,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """{"mean_kl", "perplexity", "reference_perplexity", "top1_agreement", "tokens", ...} of a loaded checkpoint.

    The source computes in float32, the checkpoint in the compiled engine. text: tokenized once, without BOS, and cut
    into windows of `context` tokens that do not overlap; None: the source writes its own.
    """
    from halfturn.converter.text import sample_text
    from halfturn.evaluate import windows

    source = open_source(reference)
    if source.config.vocab_size != model.config["vocab_size"]:
        raise Error(
            f"{reference} has a vocabulary of {source.config.vocab_size}, {model.path} of "
            f"{model.config['vocab_size']}: name the model that was converted"
        )
    if context > model.context:
        raise Error(f"windows of {context} tokens don't fit the model's context of {model.context}")
    if text is None:
        tokens = sample_text(source, count or 8, context, 1, lambda done, total: report("sample text", done, total))
    else:
        tokens = torch.tensor(windows(model.tokenizer, text, context, count))
    states = reference_states(source, tokens, lambda done, total: report("reference", done, total))
    return compare_engine(model, source, states, tokens, lambda done, total: report("compare", done, total))


@torch.inference_mode()
def compare_engine(
    model: Model,
    source: Source,
    states: Tensor,
    tokens: Tensor,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compares the source's final states [windows, length, hidden] with the logits of the compiled engine."""
    from halfturn import _C

    context = tokens.shape[1]
    norm, head = source.final_norm(), source.head()
    pages = list(range(-(-context // model.native.page_size)))
    found = Comparison()
    for done, (window, wanted) in enumerate(zip(tokens, states), 1):
        with model.lease:
            got = torch.from_numpy(model.native.logits([_C.Item(window.tolist(), 0, pages, None)]))
        for start in range(0, context, ROWS):
            rows = slice(start, start + ROWS)
            found.add(logits(source.config, wanted[rows], norm, head), got[rows], window[start + 1 : start + 1 + ROWS])
        report(done, len(tokens))
    return {**found.result(), "windows": len(tokens), "context": context, "mode": model.native.mode}
