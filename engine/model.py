"""A checkpoint that is loaded and ready to run."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from halfturn.checks import check_whole, is_there, read_json
from halfturn.error import Error, quoted
from halfturn.job import FORKED
from halfturn.machine import available_memory
from halfturn.sampling import SamplingParams, default_params
from halfturn.tokenizer import Tokenizer

Device = Literal["auto", "cpu", "cuda"]
Mode = Literal["auto", "a8", "f16"]

DEFAULT_CONTEXT = 4096
DEFAULT_SEQUENCES = 8  # whole contexts that the KV cache holds by default
MAX_THREADS, MAX_KV_TOKENS = 1024, 2**31  # the native engine's, which can't even read much larger ones
MAX_STRETCH = 1e6
KV_SHARE_OF_MEMORY = 0.25  # of what is available now; the cache always holds one whole context


class Model:
    """Weights, KV cache and tokenizer. Use Model.load(), then Generator(model).

    Attributes: `path`, `config` (config.json), `generation_config` (generation_config.json or {}), `context` (tokens),
    `native` (the compiled engine's model), `backend` (the module it comes from).
    """

    def __init__(self, path: str | Path, config: dict[str, Any], native: Any, backend: Any) -> None:
        self.path = Path(path)
        self.config = config
        self.native = native
        self.backend = backend
        self.context: int = native.context
        self.generation_config = read_json(self.path / "generation_config.json")
        self.lease = Lease()  # of the KV cache
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._read_tokenizer: Callable[[], Tokenizer] = lambda: Tokenizer.from_folder(self.path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: Device = "auto",
        context: int | None = None,
        kv_bits: tuple[int, int] = (8, 8),
        threads: int | None = None,
        mode: Mode = "auto",
        kv_tokens: int | None = None,
    ) -> Model:
        """Loads a converted checkpoint.

        `context`: most tokens of one request, prompt and answer together; None: what the model was trained for, at
        most 4096. (With dynamic RoPE, more than it was trained for turns the positions of short texts otherwise too.)
        `kv_bits`: bits of keys and of values in the cache, each 16, 8 or 4. `device` "auto": a CUDA card where there is
        one that can be used, otherwise the CPU. `threads` (of the CPU) None: one per core. `mode`: "a8" (8-bit
        activations, the default) or "f16". `kv_tokens`: tokens of all requests together that the cache holds; None: 8
        contexts, or as many as fit a share of the memory that is available on the device, at least one.
        """
        folder = Path(path)
        if device not in ("auto", "cpu", "cuda"):
            raise Error(f"device is {device!r}: it must be auto, cpu or cuda")
        if mode not in ("auto", "a8", "f16"):
            raise Error(f"mode is {mode!r}: it must be auto, a8 or f16")
        pair = isinstance(kv_bits, (tuple, list)) and len(kv_bits) == 2
        if not pair or any(type(bits) is not int or bits not in (4, 8, 16) for bits in kv_bits):
            raise Error(f"kv_bits is {quoted(kv_bits)}: it must be two of 16, 8 and 4, for keys and for values")
        if threads is not None:  # None uses every core
            check_whole("threads", threads, 1, MAX_THREADS)
        config = _config(folder)
        context = _context(config, context)
        if kv_tokens is not None:
            check_whole("kv_tokens", kv_tokens, 1, MAX_KV_TOKENS)

        from halfturn import _C

        if device != "cpu":
            problem = _C.cuda_problem()
            if problem and device == "cuda":
                raise Error(f'device is "cuda", but {problem}')
            device = "cpu" if problem else "cuda"
        if kv_tokens is None:
            memory = available_memory() if device == "cpu" else _card_memory(folder, _C.cuda_free_memory())
            kv_tokens = _kv_tokens(config, context, kv_bits, memory)
        elif kv_tokens < context:
            raise Error(f"kv_tokens is {kv_tokens}, less than the context of {context}: raise it, or lower context")

        early = _EarlyTokenizer(folder)
        native = _C.Model(
            os.fsencode(folder),
            device=device,
            threads=threads or 0,
            mode="a8" if mode == "auto" else mode,
            k_bits=kv_bits[0],
            v_bits=kv_bits[1],
            context=context,
            kv_tokens=kv_tokens,
        )
        model = cls(folder, config, native, _C)
        model._read_tokenizer = early.get
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read from the folder at first use."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer()
            return self._tokenizer

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
        """Token ids of a conversation by the model's chat template; see chat.encode_chat()."""
        from halfturn.chat import encode_chat

        return encode_chat(self.tokenizer, messages, **settings)

    def default_params(self) -> SamplingParams:
        """SamplingParams with what generation_config.json says about sampling; greedy where do_sample is false."""
        return default_params(self.generation_config)

    def info(self) -> dict[str, Any]:
        """What is loaded and how it runs; sizes in bytes."""
        native, config = self.native, self.config
        shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return {
            "path": str(self.path),
            "device": native.device,
            "device_name": native.device_name,
            "isa": native.isa,
            "mode": native.mode,
            "threads": native.threads,
            "context": self.context,
            "kv_tokens": native.pages * native.page_size,
            "vocab_size": native.vocab_size,
            **{key: config[key] for key in (*shape, "head_dim", "max_position_embeddings") if key in config},
            "weight_bytes_per_token": native.weight_bytes,
            "memory": native.memory(),
        }


class Lease:
    """One generator or measurement at a time uses a model's KV cache, in the process that loaded the model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._process = os.getpid()

    def take(self) -> None:
        """Raises Error if it is taken, or in another process: the engine's own threads and locks are not there."""
        if self._process != os.getpid():
            raise Error(FORKED)
        with self._lock:
            if self._taken:
                raise Error(
                    "this model has a generator already, which runs all its requests together: use that one, "
                    "close it first, or load the model once more"
                )
            self._taken = True

    def give_back(self) -> None:
        self._taken = False

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()


class _EarlyTokenizer:
    """Reads the tokenizer in a thread while the native engine loads weights: 0.2 s of the way to the first token."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: Tokenizer | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="halfturn-tokenizer", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._tokenizer = Tokenizer.from_folder(self._folder)
        except Exception as error:  # raised where the tokenizer is asked for
            self._error = error

    def get(self) -> Tokenizer:
        """The tokenizer, or the error of reading it."""
        self._thread.join()
        if self._tokenizer is None:
            raise self._error or Error(f"the tokenizer in {self._folder} could not be read")
        return self._tokenizer


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise Error(f"{folder} is not a folder: give the folder that `halfturn convert` wrote")
    file = folder / "config.json"
    if not is_there(file):
        raise Error(f"{folder} has no config.json: give the folder that `halfturn convert` wrote")
    config = read_json(file)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "halfturn":
        what = f"is quantized by {method!r}" if method else "is not quantized"
        raise Error(f"{folder} {what}: convert the source model first with `halfturn convert {folder} OUT`")
    return config


def _context(config: dict[str, Any], context: int | None) -> int:
    """The context to run with, checked against the positions that the model was trained for."""
    longest = config.get("max_position_embeddings")
    trained = check_whole("max_position_embeddings in config.json", longest, 1, 2**31 - 1)
    scaling = config.get("rope_scaling")
    scaling = scaling if isinstance(scaling, dict) else {}
    kind = scaling.get("rope_type", scaling.get("type"))
    longest = _stretched(trained, scaling) if kind in ("linear", "dynamic") else trained
    if context is None:
        # Dynamic scaling turns short texts otherwise too where longer ones are allowed, so these are to be asked for.
        return min(trained if kind == "dynamic" else longest, DEFAULT_CONTEXT)
    check_whole("context", context, 1)
    if context > longest:
        raise Error(f"context is {quoted(context)}: this model takes 1 to {longest} tokens (max_position_embeddings)")
    return context


def _stretched(trained: int, scaling: dict[str, Any]) -> int:
    """Positions after RoPE scaling, by the native engine's rule (Config::context_limit in csrc/model.h)."""
    factor = scaling.get("factor")
    return int(trained * factor) if isinstance(factor, (int, float)) and 1 < factor < MAX_STRETCH else trained


def _kv_tokens(config: dict[str, Any], context: int, kv_bits: tuple[int, int], memory: int) -> int:
    """Tokens of the KV cache: several contexts, within a share of the `memory` that is available, in bytes."""
    shape = [config.get(name) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    if not all(isinstance(size, int) and 0 < size < 1 << 20 for size in shape):
        return context  # a broken config: the native engine says what is wrong
    values = math.prod(size for size in shape if size)
    # Below 16 bits, each 32 values carry an fp16 scale.
    size = sum(values * (bits if bits == 16 else bits + 0.5) / 8 for bits in kv_bits)
    fitting = int(memory * KV_SHARE_OF_MEMORY / size)
    return max(context, min(context * DEFAULT_SEQUENCES, fitting))


def _card_memory(folder: Path, free: int) -> int:
    """Bytes that are left on the card when the weights are there."""
    return max(0, free - sum(file.stat().st_size for file in folder.glob("*.safetensors")))
