"""Small tokenizers for tests, and texts that are hard to tokenize."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

TEXTS = [
    "Hello, world!",
    " leading and  double   spaces\t\ttabs\n\n\nlines \r\n end ",
    "I'll we've it's DON'T 12345 3.14159 1,000,000",
    "naïve café – “quotes” … ½ ² ①",
    "日本語のテキスト 中文 한국어 العربية हिन्दी 🦊👩‍👩‍👧",
    "a\u0000b\u200b\ufeff\u0301",
    "▁ ▁▁word",
    "def f(x):\n    return x**2  # comment\n",
    " ",
    "\n",
    "",
]


def write_json(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_sentencepiece(folder: Path, **options: Any) -> Path:
    """A sentencepiece model like Llama 2's, but small: byte fallback, <unk> 0, <s> 1, </s> 2, control [INST] 3."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog and the cat sat on the mat"] * 3),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["[INST]"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
