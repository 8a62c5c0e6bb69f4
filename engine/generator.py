"""Text from a model: many requests at once, streamed, from any thread."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from halfturn.answer import Answer
from halfturn.chat import chat_size
from halfturn.checks import check_whole
from halfturn.engine_thread import CLOSED, EngineThread
from halfturn.error import ContextError, Error, quoted
from halfturn.job import Channel, FinishReason, Job, Output, Piece, Timings, TokenLogprob
from halfturn.sampling import SamplingParams
from halfturn.scheduler import Sequence as TokenSequence

__all__ = ["FinishReason", "Generator", "Job", "Output", "Piece", "Timings", "TokenLogprob"]

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class Generator:
    """Runs requests on a model, up to `max_batch` together; more wait in the order of their arrival.

    A request's greedy tokens do not depend on what else runs. All methods may be called from any thread. A model has
    one generator at a time; jobs keep theirs alive.
    `step_tokens` bounds the new tokens of one native step: smaller is smoother for others while a long prompt is read.
    """

    def __init__(self, model: Any, max_batch: int = 32, step_tokens: int | None = None) -> None:
        if step_tokens is None:
            step_tokens = model.native.step_rows
        check_whole("max_batch", max_batch, 1)
        check_whole("step_tokens", step_tokens, 1)
        self.model = model
        self.max_batch = max_batch
        model.lease.take()
        try:
            self._engine = EngineThread(model.native, model.backend, max_batch, step_tokens, model.lease.give_back)
        except BaseException:
            model.lease.give_back()
            raise
        self._finalizer = weakref.finalize(self, self._engine.close)  # also runs when the interpreter exits

    def submit(
        self,
        prompt: Prompt | None = None,
        messages: Messages | None = None,
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        at_start: bool | None = None,
        **template_settings: Any,
    ) -> Job:
        """Starts a request and returns at once. Errors in the request itself are raised here, before it is queued.

        Give either `prompt` (text, in which special tokens may be spelled, or token ids) or `messages` (a chat: dicts
        with "role" and "content"). `params` None: the model's own defaults, `model.default_params()`.
        `on_piece` gets the pieces instead of the job's iterator: it runs in the engine's thread, and must not block.
        `at_start`: the answer is a text of its own, so that the space with which sentencepiece begins a text is left
        out; None: it is one for messages, but where their last one is continued, and goes on with the prompt otherwise.
        `template_settings` go to the chat template (add_generation_prompt, continue_final_message, enable_thinking...).
        """
        if not self._finalizer.alive:
            raise Error(CLOSED)
        params = self.model.default_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise Error(f"params is {quoted(params)}: it must be SamplingParams(...)")
        params.validate(self.model.native.vocab_size)
        tokens = self.encode(prompt, messages, tools, **template_settings)
        limit = self.check_length(len(tokens), params)
        tokenizer = self.model.tokenizer
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else tokenizer.eos_token_ids)
        known = [i for i in sorted(tokenizer.eos_token_ids) if i < self.model.native.vocab_size]
        never = known if params.ignore_eos else []
        channel = Channel(len(tokens), on_piece)
        if at_start is None:
            at_start = messages is not None and not template_settings.get("continue_final_message")
        detokenizer = tokenizer.detokenizer(at_start)
        answer = Answer(channel, params, detokenizer, ends, limit, never)
        banned = sorted({*known, *params.stop_token_ids}) if params.min_tokens else never
        if len(banned) >= self.model.native.vocab_size:
            raise Error("stop_token_ids holds every token, so none can be drawn before min_tokens are: leave some out")
        sequence = TokenSequence(tokens, self._sampler(params, tokens, banned), answer)
        self._engine.submit(sequence)
        return Job(channel, lambda: self._engine.cancel(sequence))  # a job keeps its generator alive

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Pieces of the continuation of `prompt`, as they come. Leaving the loop early cancels the request."""
        return iter(self.submit(prompt, params=params))

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Output]:
        """Outputs of all prompts, in their order, run together. Raises Error if one fails."""
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise Error("generate() takes a list of prompts: put a single one into a list, or use stream()")
        jobs: list[Job] = []
        try:
            jobs += [self.submit(prompt, params=params) for prompt in prompts]
            return [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()

    def stats(self) -> dict[str, int]:
        """Counts of running and waiting requests, KV pages in use and in all, native steps and preemptions so far."""
        scheduler, pool = self._engine.scheduler, self._engine.pool
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": pool.used,
            "pages": pool.count,
            "steps": self._engine.steps,
            "preemptions": scheduler.preemptions,
        }

    @property
    def alive(self) -> bool:
        """False once the generator is closed or its engine thread has ended."""
        return self._finalizer.alive and self._engine.dead is None

    def close(self) -> None:
        """Cancels what runs and ends the engine thread."""
        self._finalizer()
        self._engine.close()  # where another thread closes it: waits for the end too

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(
        self,
        prompt: Prompt | None = None,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_settings: Any,
    ) -> list[int]:
        """Token ids of a request, as submit() takes it. Text that can't fit the context is refused before it is
        tokenized, which takes seconds for megabytes."""
        if (prompt is None) == (messages is None):
            raise Error("a request needs either a prompt or messages, and not both")
        if messages is None and (tools or template_settings):
            raise Error("tools and chat template settings need messages; a prompt has no template")
        if messages is not None:
            if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
                raise Error(f"messages is {quoted(messages)}: it must be a list of objects with a role and content")
            self._check_size(chat_size(messages))
            tokens = self.model.encode_chat(messages, tools=tools, check=self._check_size, **template_settings)
        elif isinstance(prompt, str):
            self._check_size(len(prompt))
            tokens = self.model.tokenizer.encode(prompt, add_special_tokens=True, allow_special=True)
        else:
            assert prompt is not None
            tokens = _token_ids(prompt, self.model.native.vocab_size)
        if not tokens:
            raise Error("the prompt is empty: give at least one token of text (this model adds no BOS token)")
        return tokens

    @property
    def _context(self) -> int:
        """The most tokens of a request, its new ones too."""
        native = self.model.native
        return int(min(native.context, native.pages * native.page_size))

    def _check_size(self, characters: int) -> None:
        context = self._context
        if characters > context and characters > (most := context * self.model.tokenizer.longest_token):
            raise ContextError(
                f"the prompt has {characters} characters, the context of {context} tokens holds at most {most}: "
                f"shorten it, or load the model with a larger context"
            )

    def check_length(self, length: int, params: SamplingParams) -> int:
        """The most tokens that a request with a prompt of `length` may draw; raises ContextError if it can't fit."""
        context = self._context
        wanted = params.max_tokens if params.max_tokens is not None else max(1, params.min_tokens)
        if length + wanted > context:
            asked = f" and {quoted(wanted)} new ones" if wanted > 1 else ""
            raise ContextError(
                f"the prompt has {length} tokens{asked}, the context holds {context}: shorten it, "
                f"lower max_tokens, or load the model with a larger context",
                prompt_fits=length < context,
            )
        return params.max_tokens if params.max_tokens is not None else context - length

    def _sampler(self, params: SamplingParams, tokens: list[int], banned: list[int]) -> Any:
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
        sampler = self.model.backend.Sampler(
            temperature=float(params.temperature),
            top_k=min(params.top_k, self.model.native.vocab_size),  # the compiled sampler counts in 32 bits
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            logit_bias={int(token): float(bias) for token, bias in params.logit_bias.items()},
            seed=seed,
            logprobs=-1 if params.logprobs is None else params.logprobs,
            banned=banned,
        )
        if params.repetition_penalty != 1.0:
            sampler.accept(tokens)
        return sampler


def _token_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """The prompt as a list of ints; numpy's integers are welcome."""
    if isinstance(prompt, (bytes, bytearray, Set, Mapping)):
        raise Error(f"a prompt is text or a list of token ids, not {type(prompt).__name__}")
    try:
        tokens = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise Error(f"a prompt is text or a list of token ids, which are whole numbers: {error}") from error
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise Error(f"the prompt holds {quoted(token)}: token ids are whole numbers from 0 to {vocab_size - 1}")
    return tokens
