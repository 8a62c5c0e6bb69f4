"""The endpoints: each reads a request, starts its jobs, and answers with their whole output or a stream of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halfturn.error import ContextError, Error, quoted
from halfturn.sampling import MAX_SEED, SamplingParams
from halfturn.server.answers import Answer, ChatAnswer, CompletionAnswer, model_card
from halfturn.server.errors import REFUSED, ApiError, shutting_down
from halfturn.server.schema import ChatRequest, CompletionRequest, Sampling, parse
from halfturn.server.stream import Bridge, EventStream, Feed, WholeAnswer

if TYPE_CHECKING:
    from halfturn.generator import Generator

router = APIRouter()

# Fields that SamplingParams has under the same name and with the same meaning.
_SAME = (
    *("max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
BODIES = 4  # bodies of the largest size that may arrive or be encoded at a time
SMALL_BODY = 1 << 16  # bytes; such a one is read whatever others do
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions


@dataclass
class Service:
    """What every request needs."""

    generator: Generator
    name: str  # of the model, in the API
    bridge: Bridge
    fingerprint: str
    created: int
    max_waiting: int  # choices beyond those that run at once
    max_body_bytes: int
    body_bytes: int = 0  # of requests whose body arrives or is being encoded

    def check_model(self, name: str | None) -> None:
        """One model is served: a request may leave its name out, but not ask for another."""
        if name not in (None, self.name):
            message = f"the model {quoted(name)} does not exist; this server has {self.name!r}"
            raise ApiError(message, "model", "model_not_found", 404)

    def open(self, choices: int, whole: bool) -> Feed:
        """A feed for `choices` jobs, unless they would make the queue longer than its bound."""
        if self.bridge.closing:
            raise shutting_down()
        unsent = self.bridge.unsent
        bound = self.generator.max_batch + self.max_waiting
        if choices > bound:
            raise ApiError(f"{choices} choices are more than the {bound} that this server takes at a time", "n")
        if unsent + choices > bound:
            message = (
                f"the server is busy: {unsent} choices run, wait or are being sent, and {choices} more would pass its "
                f"bound of {bound}; try again later"
            )
            raise ApiError(message, code="queue_full", status=503)
        return self.bridge.open(choices, whole)


def service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine can serve, 503 once it can't; with counts of requests that run and wait."""
    generator = service(request).generator
    state = {"status": "ok" if generator.alive else "failed", "model": service(request).name, **generator.stats()}
    return JSONResponse(state, 200 if generator.alive else 503)


@router.head("/v1/models", include_in_schema=False)
@router.head("/v1/models/", include_in_schema=False)
@router.get("/v1/models/", include_in_schema=False)
@router.get("/v1/models", responses=REFUSED)
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_card(service(request))]}


@router.head("/v1/models/{model:path}", include_in_schema=False)
@router.get("/v1/models/{model:path}", responses=REFUSED)
async def model(request: Request, model: str) -> dict[str, Any]:
    service(request).check_model(model)
    return _card(service(request))


def _body_schema(kind: type[Sampling]) -> dict[str, Any]:
    """The body is read by hand, so that every refusal names its field; this is what /openapi.json says about it."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref", "").removeprefix("#/$defs/")
            return inlined(parts[reference]) if reference else {k: inlined(v) for k, v in value.items()}
        return [inlined(v) for v in value] if isinstance(value, list) else value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}}


@router.post("/v1/chat/completions", responses=REFUSED, openapi_extra=_body_schema(ChatRequest))
async def chat_completions(request: Request) -> Response:
    run = service(request)
    async with _body(request, run) as given:
        _check_count(given, run.generator.model.context)
        return await _chat(run, parse(ChatRequest, given))


async def _chat(run: Service, body: ChatRequest) -> Response:
    run.check_model(body.model)
    tokenizer = run.generator.model.tokenizer
    answer = ChatAnswer(run.name, run.fingerprint, tokenizer, usage=body.include_usage())
    settings: dict[str, Any] = {}
    if body.logprobs:
        settings["logprobs"] = body.top_logprobs or 0
    if body.max_completion_tokens is not None:
        settings["max_tokens"] = body.max_completion_tokens
    params = _params(run, body, settings)

    def encode() -> list[list[int]]:
        template = body.template_settings()
        return [run.generator.encode(messages=body.conversation(), tools=body.template_tools(), **template)]

    return await _answer(run, body, answer, params, encode)


@router.post("/v1/completions", responses=REFUSED, openapi_extra=_body_schema(CompletionRequest))
async def completions(request: Request) -> Response:
    run = service(request)
    async with _body(request, run) as given:
        return await _completions(run, parse(CompletionRequest, given))


async def _completions(run: Service, body: CompletionRequest) -> Response:
    run.check_model(body.model)
    prompts = body.prompts()
    tokenizer = run.generator.model.tokenizer
    answer = CompletionAnswer(run.name, run.fingerprint, tokenizer, prompts=len(prompts), usage=body.include_usage())
    settings: dict[str, Any] = {"max_tokens": COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens}
    if body.logprobs is not None:
        settings["logprobs"] = body.logprobs
    params = _params(run, body, settings)

    def encode() -> list[list[int]]:
        tokens = []
        for prompt in prompts:
            tokens.append(run.generator.encode(prompt))
            run.generator.check_length(len(tokens[-1]), params)
        if body.echo:
            for prompt, ids in zip(prompts, tokens):
                text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special_tokens=False)
                answer.echoes += [text] * (body.n or 1)
        return tokens

    return await _answer(run, body, answer, params, encode)


async def _answer(
    run: Service,
    body: Sampling,
    answer: Answer,
    params: SamplingParams,
    encode: Callable[[], list[list[int]]],
) -> Response:
    """Starts n jobs for each prompt and answers when they are done, or as they go."""
    copies = body.n or 1
    # The answer of a chat is a text of its own; others go on with the prompt's.
    at_start = isinstance(body, ChatRequest) and not body.continue_final_message
    feed = run.open(answer.prompts * copies, whole=not body.stream)
    answer.jobs = feed.jobs

    def submit() -> None:
        try:
            prompts = encode()
        except Error as error:
            raise _refusal(error, body, run, of_prompt=True) from error
        for prompt in prompts:
            for copy in range(copies):
                # Equal seeds would draw n equal choices.
                own = params if params.seed is None else replace(params, seed=(params.seed + copy) & MAX_SEED)
                listener = run.bridge.listener(feed, len(feed.jobs))
                try:
                    job = run.generator.submit(prompt, params=own, on_piece=listener, at_start=at_start)
                    feed.jobs.append(job)
                except Error as error:
                    raise _refusal(error, body, run) from error
                if feed.gone:
                    feed.cancel()
                    return

    try:
        # In a thread: templates and tokenizers take milliseconds for long prompts, which would stall every stream.
        await asyncio.to_thread(submit)
    except BaseException:
        feed.leave()  # also stops the thread if it still submits
        raise
    return EventStream(feed, answer.chunks) if body.stream else WholeAnswer(feed, answer.whole)


def _params(run: Service, body: Sampling, settings: dict[str, Any]) -> SamplingParams:
    """What the request says, then the model's own generation_config.json, then the plain distribution."""
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None} | settings
    if body.top_k == -1:  # vLLM's notation for "off"
        given["top_k"] = 0
    if body.top_p == 0:  # OpenAI allows it: the smallest nucleus is the likeliest token
        given["top_k"], given["top_p"] = 1, 1.0
    if body.seed is not None:
        given["seed"] = body.seed & MAX_SEED
    if body.logit_bias:
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    given["stop"] = tuple(body.stop)
    return replace(run.generator.model.default_params(), **given)


def _refusal(error: Error, body: Sampling, run: Service, of_prompt: bool = False) -> ApiError:
    """The engine's sentence, with the field that it is about: the one that it names first, if not that of the prompt,
    whose own words a sentence may quote."""
    if not run.generator.alive:
        return ApiError(f"the engine can't take requests: {error}", code="engine_error", status=503)
    prompt = "messages" if isinstance(body, ChatRequest) else "prompt"
    fields = type(body).model_fields
    if isinstance(error, ContextError):
        names = ("max_completion_tokens", "max_tokens", "min_tokens")
        limits = [name for name in names if getattr(body, name, None) is not None]
        named = limits[0] if error.prompt_fits and limits else prompt
        sentence = str(error).replace("max_tokens", limits[0]) if limits else str(error)
        return ApiError(sentence, named, "context_length_exceeded")
    if of_prompt:
        found = re.match(r"tools(?= )|messages\[\d+\]\.\w+", str(error))
        return ApiError(str(error), found.group() if found else prompt, "invalid_value")
    named = next((word for word in re.findall(r"\w+", str(error)) if word in fields), prompt)
    return ApiError(str(error), named, "invalid_value")


def _card(run: Service) -> dict[str, Any]:
    return model_card(run.name, run.created, run.generator.model.context)


@asynccontextmanager
async def _body(request: Request, run: Service) -> AsyncIterator[bytes]:
    """The body, as long as it is JSON by its header and not too long. The block should end with the use of its parts:
    so long it counts towards the bytes that all requests together may keep.

    The header matters: browsers let any web page post plain text to a local server, but ask first before JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"the content type must be application/json, not {kind!r}", "content-type", status=415)
    limit = run.max_body_bytes
    too_large = ApiError(f"the request body is larger than {limit} bytes", code="body_too_large", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            run.body_bytes += len(part)
            if size > limit:
                raise too_large
            if size > SMALL_BODY and run.body_bytes > BODIES * limit:
                message = f"the server is busy with large requests: {run.body_bytes} bytes of them; try again later"
                raise ApiError(message, code="queue_full", status=503)
        body = b"".join(parts)
        parts.clear()
        yield body
    finally:
        run.body_bytes -= size


def _check_count(body: bytes, context: int) -> None:
    """Refuses more messages than the context has tokens before a model is made of each, which takes seconds."""
    if len(body) <= 12 * context:  # a message takes as many: {"role":""},
        return
    try:
        messages = from_json(body).get("messages")
    except (ValueError, AttributeError):
        return  # parse() has the sentence
    if isinstance(messages, list) and len(messages) > context:
        message = f"there are {len(messages)} messages, more than the {context} tokens of the context"
        raise ApiError(message, "messages", "context_length_exceeded")
