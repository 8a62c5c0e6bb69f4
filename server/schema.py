"""Request bodies of the API, checked strictly: what can't be honoured is refused by the field's name.

The fields are OpenAI's, plus the sampling settings that users of other local servers expect (top_k, min_p, ...). Fields
that only concern OpenAI's own service (`user`, `store`, ...) are accepted. Any other field is refused, as OpenAI does:
a misspelt setting that is quietly ignored costs its user more than an error.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from halfturn.checks import is_number
from halfturn.error import quoted
from halfturn.server.errors import ApiError, from_validation

MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOPS = 16

# They steer OpenAI's service (billing, storage, routing, speed), never the text of the answer.
HARMLESS = {
    *("user", "store", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "prediction"),
}

# Fields of the request, and parameters of the functions that template settings pass through.
RESERVED = {
    *("messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("self", "prompt", "tokenizer", "check"),
    *("chat_template", "tokenize"),  # which mean something elsewhere
}

_Probability = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Count = Annotated[int, Field(ge=1)]
_TokenId = Annotated[int, Field(ge=0)]
# Of a list, the first entry that is wrong is enough: a body of many took seconds to refuse.
_FIRST = Field(fail_fast=True)
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; there is none here


class Sampling(BaseModel):
    """Fields that both generating endpoints share. None means: not given."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    # Features that don't exist yet, and the values of their fields that ask for nothing.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: _Count | None = None
    min_tokens: _TokenId | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: _Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: _Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, Any] | None = None
    seed: _Seed | None = None
    stop: Any = None
    stop_token_ids: Annotated[list[_TokenId], _FIRST] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS:
                continue
            if name not in self.neutral:
                name = name if len(name) <= 80 else name[:77] + "..."
                raise ApiError(f"unrecognized request argument: {name}", name, "unknown_parameter")
            if value not in self.neutral[name]:
                raise ApiError(f"{name} is not supported by this server", name, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is only allowed when stream is true", "stream_options", "invalid_value")
        self.stop = check_stop(self.stop)
        for key, bias in (self.logit_bias or {}).items():
            if not is_number(bias, -100, 100):
                raise ApiError(
                    f"logit_bias.{key[:20]} must be a number from -100 to 100, not {quoted(bias)}", "logit_bias"
                )
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ApiError(f"logit_bias maps token ids to numbers; {key[:20]!r} is not a token id", "logit_bias")
        return self

    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(BaseModel):
    """One message of a conversation; `content` arrives as a string or as a list of text parts."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: Any = None
    tool_calls: Annotated[list[dict[str, Any]], _FIRST] | None = None


class ChatRequest(Sampling):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "tool_choice": ("none", "auto"),
        "reasoning_effort": ("none",),
        **dict.fromkeys(("audio", "verbosity", "web_search_options"), ()),
    }
    messages: Annotated[list[Message], _FIRST]
    tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if not self.messages:
            raise ApiError("messages is empty; send at least one message", "messages", "invalid_value")
        if self.add_generation_prompt and self.continue_final_message:
            message = "add_generation_prompt and continue_final_message exclude each other; leave one out"
            raise ApiError(message, "continue_final_message", "invalid_value")
        if reserved := sorted(RESERVED & set(self.chat_template_kwargs or ())):
            name = f"chat_template_kwargs.{reserved[0]}"
            raise ApiError(f"{name} can't be set; leave it out", name, "invalid_value")
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
        for index, tool in enumerate(self.tools or []):
            if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
                message = f'tools[{index}] must be {{"type": "function", "function": {{...}}}}'
                raise ApiError(message, f"tools[{index}]", "invalid_value")
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as Generator.encode() takes them: roles that chat templates know, content as text."""
        return [_template_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]

    def template_tools(self) -> list[dict[str, Any]] | None:
        """tool_choice "none" hides the tools from the model: nothing else keeps it from calling one."""
        hidden = (self.model_extra or {}).get("tool_choice") == "none"
        return None if hidden else self.tools or None

    def template_settings(self) -> dict[str, Any]:
        """What else the chat template is told, by the names that Generator.encode() takes."""
        names = ("add_generation_prompt", "continue_final_message")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return (self.chat_template_kwargs or {}) | given


class CompletionRequest(Sampling):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}
    prompt: Any = Field(json_schema_extra={"description": "a string, strings, token ids, or lists of token ids"})
    echo: bool | None = None
    best_of: _Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            message = "logprobs of an echoed prompt are not supported; drop echo or logprobs"
            raise ApiError(message, "echo", "unsupported_parameter")
        choices = len(self.prompts()) * (self.n or 1)
        if choices > MAX_CHOICES:
            raise ApiError(f"prompt times n asks for {choices} choices; at most {MAX_CHOICES} are allowed", "prompt")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError("best_of other than n is not supported", "best_of", "unsupported_parameter")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if _is_tokens(prompt):
            return [prompt]
        if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _is_tokens(p) for p in prompt):
            return prompt
        message = "prompt must be a string, a list of strings, a list of token ids or a list of such lists; none empty"
        raise ApiError(message, "prompt", "invalid_type")


def parse(kind: type[Any], body: bytes) -> Any:
    """A checked request of class `kind` from the bytes of a body; raises ApiError."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def check_stop(stop: Any) -> list[str]:
    """OpenAI's string or list of strings, as a list."""
    stops = [stop] if isinstance(stop, str) and stop else [] if stop is None or stop == "" else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ApiError("stop must be a string or a list of strings", "stop", "invalid_type")
    if not all(stops) or len(stops) > MAX_STOPS:
        message = f"stop takes up to {MAX_STOPS} strings that are not empty; {len(stops)} were given"
        raise ApiError(message, "stop", "invalid_value")
    return stops


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int and t >= 0 for t in value)


def _template_message(message: Message, name: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant", "tool"):
        known = "system, developer, user, assistant or tool"
        raise ApiError(f"{name}.role must be {known}, not {quoted(role)}", f"{name}.role", "invalid_value")
    rendered = {k: v for k, v in (message.model_extra or {}).items() if v is not None and k != "refusal"}
    if rendered.get("function_call"):
        field = f"{name}.function_call"
        raise ApiError(f"{field} is not supported; use tool_calls", field, "unsupported_content")
    rendered |= {"role": role, "content": _content(message, name)}
    if message.tool_calls:
        for i, call in enumerate(message.tool_calls):
            _check_call(call, f"{name}.tool_calls[{i}]")
        rendered["tool_calls"] = message.tool_calls
    return rendered


def _content(message: Message, name: str) -> str | list[dict[str, str]]:
    content = message.content
    if not content and message.role == "assistant":
        refusal = (message.model_extra or {}).get("refusal")
        if refusal is not None and not isinstance(refusal, str):
            raise ApiError(f"{name}.refusal must be a string", f"{name}.refusal", "invalid_type")
        content = refusal or ("" if content is None and message.tool_calls else content)
    if isinstance(content, str):
        return content
    name += ".content"
    if not isinstance(content, list) or not content:
        given = "missing" if content is None else "empty" if content == [] else f"of type {type(content).__name__}"
        raise ApiError(f"{name} must be a string or a list of text parts; it is {given}", name, "invalid_type")
    parts = []
    for index, part in enumerate(content):
        where = f"{name}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" and not (kind == "refusal" and message.role == "assistant"):
            message_text = f"{where} is of type {quoted(kind)}; this model reads text parts only"
            raise ApiError(message_text, f"{where}.type", "unsupported_content")
        if not isinstance(part.get(kind), str):
            raise ApiError(f"{where}.{kind} must be a string", f"{where}.{kind}", "invalid_type")
        parts.append({"type": "text", "text": part[kind]})
    return parts


def _check_call(call: dict[str, Any], name: str) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"{name}.function must be an object with a name", f"{name}.function", "invalid_type")
