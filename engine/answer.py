"""The text side of one request: tokens in; pieces, stops, limits and the final output out."""

from __future__ import annotations

import time
from typing import Any, Literal

from halfturn.error import Error
from halfturn.job import Channel, FinishReason, Output, Piece, Timings, TokenLogprob
from halfturn.sampling import SamplingParams


class Answer:
    """Collects one request's tokens. Runs in the engine thread, except for the constructor.

    `limit` is the most tokens it may draw; `end_ids` end it and are no part of its text;
    `banned_later` are the tokens that stay banned once min_tokens are there.
    """

    def __init__(
        self,
        channel: Channel,
        params: SamplingParams,
        detokenizer: Any,
        end_ids: frozenset[int],
        limit: int,
        banned_later: list[int],
    ) -> None:
        self.channel, self.detokenizer, self.end_ids, self.limit = channel, detokenizer, end_ids, limit
        self.banned_later = banned_later
        self.stops = params.stops
        self.min_tokens = params.min_tokens
        self.wants_logprobs = params.logprobs is not None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.texts: list[str] = []
        self.sent = 0  # tokens that pieces have carried
        self.held = ""  # text that may be the beginning of a stop string
        self.cached = 0
        self.finished = False
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first: float | None = None
        self.last = self.submitted

    def goes_on(self, drawn: int) -> bool:
        """Whether a token is wanted after `drawn` tokens, as far as their number decides it."""
        return not self.finished and drawn < self.limit

    def accept(self, sample: Any) -> bool:
        """Takes the next drawn token, sends what is safe to show; True when the request has ended."""
        token = sample.token
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last
        self.token_ids.append(token)
        if self.wants_logprobs:
            self.logprobs.append(TokenLogprob(token, sample.logprob, list(sample.top)))
        if token in self.end_ids:
            self._end(self._rest(), "stop", token)
            return True
        text = self.detokenizer.add(token)
        if self.stops:
            stop, text = self._search(text, len(self.token_ids) > self.min_tokens)
            if stop is not None:
                self._end(text, "stop", stop)
                return True
        if len(self.token_ids) >= self.limit:
            self._end(text + self._rest(), "length", None)
            return True
        if text:
            self._send(text, None)
        return False

    def finish(self, reason: Literal["cancelled", "error"], error: Error | None = None) -> None:
        """Ends the request from outside, with the text held for a stop string.

        The detokenizer is not asked: it may be what failed, and whoever waits for this request must hear of it.
        """
        self._end(self.held, reason, None, error)

    def _search(self, text: str, may_stop: bool) -> tuple[str | None, str]:
        """The earliest stop string in the held text and `text`, and the text before it that may be shown now.

        Those that are complete before they `may_stop` are text like any other, though held for what they may begin.
        """
        before = len(self.held)
        text = self.held + text
        self.held = ""
        ends_now = [(text.find(stop, max(0, before + 1 - len(stop))), -len(stop), stop) for stop in self.stops]
        found = [match for match in ends_now if match[0] >= 0]
        if found and may_stop:
            at, _, stop = min(found)
            return stop, text[:at]
        keep = max(_overlap(text, stop) for stop in self.stops)
        if keep:
            self.held = text[-keep:]
            text = text[:-keep]
        return None, text

    def _rest(self) -> str:
        text, self.held = self.held + self.detokenizer.flush(), ""
        return text

    def _piece(self, text: str, reason: FinishReason | None) -> Piece:
        new = slice(self.sent, len(self.token_ids))
        self.sent = new.stop
        return Piece(text, self.token_ids[new], self.logprobs[new] if self.wants_logprobs else None, reason)

    def _send(self, text: str, reason: FinishReason | None) -> None:
        self.texts.append(text)
        self.channel.send(self._piece(text, reason))

    def _end(self, text: str, reason: FinishReason, stop_reason: str | int | None, error: Error | None = None) -> None:
        if self.finished:
            return
        self.finished = True
        self.texts.append(text)
        output = Output(
            text="".join(self.texts),
            token_ids=self.token_ids,
            finish_reason=reason,
            prompt_tokens=self.channel.prompt_tokens,
            logprobs=self.logprobs if self.wants_logprobs else None,
            stop_reason=stop_reason,
            timings=self._timings(),
        )
        self.channel.close(self._piece(text, reason), output, error)

    def _timings(self) -> Timings:
        now, later = time.perf_counter(), len(self.token_ids) - 1
        decoding = self.last - self.first if self.first is not None else 0.0
        return Timings(
            queue_s=(self.started if self.started is not None else now) - self.submitted,
            time_to_first_token_s=None if self.first is None else self.first - self.submitted,
            total_s=now - self.submitted,
            decode_tokens_per_second=later / decoding if later > 0 and decoding > 0 else None,
            cached_prompt_tokens=self.cached,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins (never all of `stop`)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
