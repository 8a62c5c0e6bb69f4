"""Response bodies: whole answers and the chunks of streamed ones, as OpenAI shapes them."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from halfturn.server.errors import ApiError, internal_error, shutting_down

if TYPE_CHECKING:
    from halfturn.generator import Output, Piece
    from halfturn.job import Job, TokenLogprob
    from halfturn.tokenizer import Tokenizer

MERGED = 32  # pieces with log probabilities in one chunk: more would take too long to make without a pause


class Answer(ABC):
    """One answer of one or more choices; choice i is jobs[i].

    Subclasses say how text and logprobs are wrapped: `choice` for a whole answer, `delta` for a part of a streamed one,
    `last` for its end. The token that ended an answer is no part of its logprobs; those of a stop string, which may
    share tokens with the text before it, are.
    """

    prefix = whole_object = chunk_object = ""

    def __init__(
        self, model: str, fingerprint: str, tokenizer: Tokenizer, prompts: int = 1, usage: bool = False
    ) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model, self.fingerprint, self.tokenizer = model, fingerprint, tokenizer
        self.prompts = prompts  # the choices of one prompt share its tokens in `usage`
        self.usage = usage  # streamed: a last chunk tells the usage
        self.jobs: Sequence[Job] = ()
        self._started: set[int] = set()
        self._ended = 0

    def whole(self) -> dict[str, Any]:
        """The answer once every job has ended, for stream.pieces(): its long lists are iterators."""
        outputs = [finished(job) for job in self.jobs]
        choices = (self.choice(i, output) for i, output in enumerate(outputs))
        return self._envelope(self.whole_object, choices) | {"usage": self._usage(outputs)}

    def chunks(self, taken: list[tuple[int, Piece]]) -> Iterator[dict[str, Any]]:
        """The events for newly arrived pieces, those of one choice merged. Raises ApiError after those of a job that
        failed."""
        found: dict[int, list[Piece]] = {}
        for index, piece in taken:
            found.setdefault(index, []).append(piece)
        for index, pieces in found.items():
            if index not in self._started:
                self._started.add(index)
                yield from (self._chunk([first]) for first in self.first(index))
            merged = len(pieces) if pieces[0].logprobs is None else MERGED
            for part in (pieces[at : at + merged] for at in range(0, len(pieces), merged)):
                text = "".join(piece.text for piece in part)
                logprobs = [entry for piece in part for entry in piece.logprobs or ()]
                if part[-1].finish_reason == "stop":
                    logprobs = _of_the_text(logprobs, finished(self.jobs[index]))
                if text or logprobs:
                    yield self._chunk([self.delta(index, text, logprobs)])
            if pieces[-1].finish_reason is not None:
                reason = finished(self.jobs[index]).finish_reason
                yield self._chunk([self.last(index, reason)])
                self._ended += 1
        if self.usage and taken and self._ended == len(self.jobs):
            yield self._chunk([]) | {"usage": self._usage([finished(job) for job in self.jobs])}

    def first(self, index: int) -> list[dict[str, Any]]:
        """What a streamed choice starts with."""
        return []

    @abstractmethod
    def choice(self, index: int, output: Output) -> dict[str, Any]: ...

    @abstractmethod
    def delta(self, index: int, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]: ...

    @abstractmethod
    def last(self, index: int, reason: str) -> dict[str, Any]: ...

    def _envelope(self, kind: str, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._envelope(self.chunk_object, choices)
        return chunk | {"usage": None} if self.usage else chunk

    def _usage(self, outputs: list[Output]) -> dict[str, Any]:
        firsts = outputs[:: max(1, len(outputs) // self.prompts)]  # one choice of each prompt
        prompt = sum(output.prompt_tokens for output in firsts)
        completion = sum(len(output.token_ids) for output in outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(o.timings.cached_prompt_tokens for o in firsts)},
        }


class ChatAnswer(Answer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        entries = output.logprobs
        logprobs = None if entries is None else self._logprobs(_of_the_text(entries, output))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": output.finish_reason}

    def first(self, index: int) -> list[dict[str, Any]]:
        return [_chat_delta(index, {"role": "assistant", "content": ""})]

    def delta(self, index: int, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return _chat_delta(index, {"content": text}, _listed(self._logprobs(logprobs)) if logprobs else None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return _chat_delta(index, {}, None, reason)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Iterator[Any]]:
        return {"content": (self._entry(e.token_id, e.logprob) | {"top_logprobs": self._top(e)} for e in entries)}

    def _top(self, entry: TokenLogprob) -> list[dict[str, Any]]:
        return [self._entry(token, logprob) for token, logprob in entry.top]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelt = self.tokenizer.token_bytes(token)
        return {"token": spelt.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(spelt)}


class CompletionAnswer(Answer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *settings: Any, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.echoes: list[str] = []  # the prompt of each choice, where it is to be repeated
        self._rulers: dict[int, Ruler] = {}  # of each choice

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        echo = self.echoes[index] if self.echoes else ""
        entries = output.logprobs
        logprobs = None if entries is None else self._logprobs(index, _of_the_text(entries, output))
        return _completion_choice(index, echo + output.text, logprobs, output.finish_reason)

    def first(self, index: int) -> list[dict[str, Any]]:
        return [_completion_choice(index, self.echoes[index])] if self.echoes else []

    def delta(self, index: int, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return _completion_choice(index, text, _listed(self._logprobs(index, logprobs)) if logprobs else None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return _completion_choice(index, "", None, reason)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Iterator[Any]]:
        ruler = self._rulers.setdefault(index, Ruler(self.tokenizer))
        return {
            "tokens": (self._name(entry.token_id) for entry in entries),
            "token_logprobs": (_finite(entry.logprob) for entry in entries),
            "top_logprobs": (self._top(entry) for entry in entries),
            "text_offset": (ruler.place(entry.token_id) for entry in entries),
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the drawn one where it isn't one of them."""
        found: dict[str, float] = {}
        for token, logprob in entry.top:  # the best first: of several of one name it stays
            found.setdefault(self._name(token), _finite(logprob))
        return found | {self._name(entry.token_id): _finite(entry.logprob)}

    def _name(self, token: int) -> str:
        """The token as text; OpenAI's notation where it is a part of a character."""
        spelt = self.tokenizer.token_bytes(token)
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


class Ruler:
    """Where tokens begin in a completion's text, in characters; those inside a character begin where it does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer(at_start=False)
        self._length = 0

    def place(self, token: int) -> int:
        start = self._length
        self._length += len(self._detokenizer.add(token))
        return start


def _listed(logprobs: dict[str, Iterator[Any]]) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in logprobs.items()}


def _of_the_text(entries: list[TokenLogprob], output: Output) -> list[TokenLogprob]:
    """The last tokens of an answer without the one that ended it, if one did."""
    return entries[:-1] if isinstance(output.stop_reason, int) else entries


def finished(job: Job) -> Output:
    """The output of a job that has ended; raises ApiError if it didn't end by itself."""
    from halfturn.error import Error

    try:
        output = job.result(timeout=0)
    except Error as error:
        raise ApiError(f"the engine failed: {error}", code="engine_error", status=500) from error
    if output.finish_reason == "cancelled":
        raise shutting_down()  # nothing else cancels a job whose client still listens
    if output.finish_reason == "error":
        raise internal_error()
    return output


def model_card(name: str, created: int, context: int) -> dict[str, Any]:
    """An entry of /v1/models. `max_model_len` is vLLM's field for the longest prompt plus answer, in tokens."""
    return {"id": name, "object": "model", "created": created, "owned_by": "halfturn", "max_model_len": context}


def _chat_delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _completion_choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI writes for a token without probability."""
    return max(logprob, -9999.0)
