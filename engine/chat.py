"""Conversations to token ids, by the model's own chat template.

A template writes special tokens as text, and a message can spell the same text. So that only the template's own become
special ids, the messages' spellings are interrupted by a mark before the template runs: a character that occurs in
neither of them. The rendered text is then encoded so that interrupted spellings are plain text, and without the mark.
Messages that spell nothing are passed as they are, and give the ids of the plainly rendered text.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from halfturn.error import Error
from halfturn.tokenizer import Tokenizer

if TYPE_CHECKING:
    from halfturn.sandbox import Program

_MARKS = range(0x10F000, 0x10FFF0)  # private use


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    check: Callable[[int], None] = lambda characters: None,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, ready for the model's answer.

    `messages`: dicts with "role", "content" (a string or a list of {"type": "text", "text"} parts, which become lines),
    and whatever else the template reads ("tool_calls", "tool_call_id", "name"). `continue_final_message`: the answer
    goes on where the last message ends. `check` is told how many characters the text has before it is tokenized, and
    may raise. `variables` are passed to the template. Raises Error for bad messages, and when the template refuses them
    or there is none.
    """
    try:
        settings = (add_generation_prompt, continue_final_message, variables)
        text, mark = _run(tokenizer, messages, tools, *settings, marked=True)
    except RecursionError as error:
        raise Error("the messages or tools are nested too deep: a chat template takes some hundred levels") from error
    check(len(text))
    return tokenizer.encode_marked(text, mark)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text, to look at; in it, a template's special tokens and a message's look the same."""
    settings = (add_generation_prompt, continue_final_message, variables)
    return _run(tokenizer, messages, tools, *settings, marked=False)[0]


def chat_size(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of the messages' texts, and one for each message: what a chat can't be shorter than."""
    size = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, (list, tuple)) else [content]
        texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
        size += 1 + sum(len(text) for text in texts if isinstance(text, str))
    return size


def _run(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    prompt: bool,
    go_on: bool,
    variables: dict[str, Any],
    marked: bool,
) -> tuple[str, str]:
    """The text, and the mark that interrupts what spells special tokens in it, if it is to be `marked`."""
    # Arguments are read before anything is interrupted: json can spell a special token by escapes.
    conversation = [_with_arguments(_checked(i, message), json.loads) for i, message in enumerate(messages)]
    called = next((i for i, message in enumerate(conversation) if message.get("tool_calls")), None)
    source = _choose_template(tokenizer, bool(tools) or called is not None)
    if not conversation:
        raise Error("messages is empty: a conversation needs at least one message")
    mark, end = _unused_characters([source, *_strings(conversation), *_strings(tools), *_strings(variables)])
    if marked:
        interrupt = _interrupter(tokenizer, mark)
        conversation, tools, variables = interrupt(conversation), interrupt(tools), interrupt(variables)
    if go_on:
        if not isinstance(conversation[-1]["content"], str):
            raise Error("continue_final_message needs a last message with text; this one has none")
        conversation[-1] = {**conversation[-1], "content": conversation[-1]["content"] + end}
    values = {
        **tokenizer.template_tokens,
        "messages": conversation,
        "tools": tools or None,
        "documents": None,
        "add_generation_prompt": prompt and not go_on,
        **variables,
    }
    program = _program(source)
    if tools and "tools" not in program.variables:
        raise Error("tools are given, but this model's chat template has no place for them: leave them out")
    text = _render(program, values)
    if called is not None and text == _without_calls(program, values):
        raise Error(
            f"messages[{called}].tool_calls are given, but this model's chat template has no place for them: "
            "put what was called into the content"
        )
    if go_on:
        if end not in text:
            raise Error("the chat template leaves out the last message, so it can't be continued")
        text = text[: text.rindex(end)].replace(end, "")
    return text, mark


@lru_cache(maxsize=8)
def _program(source: str) -> Program:
    from halfturn.sandbox import Program  # jinja2 takes 40 ms to import: only chats pay for it

    return Program(source)


def _render(program: Program, values: dict[str, Any]) -> str:
    """Renders with a tool call's arguments as an object, as most templates want; where that fails, as json text."""
    try:
        return program.render(values)
    except Error:
        texts = [_with_arguments(m, lambda a: json.dumps(a, ensure_ascii=False)) for m in values["messages"]]
        if texts == values["messages"]:
            raise
        with contextlib.suppress(Error):
            return program.render({**values, "messages": texts})
        raise


def _without_calls(program: Program, values: dict[str, Any]) -> str | None:
    """The same conversation without its tool calls; None where the template does not take that."""
    bare = [{key: value for key, value in m.items() if key != "tool_calls"} for m in values["messages"]]
    with contextlib.suppress(Error):
        return program.render({**values, "messages": bare})
    return None


def _with_arguments(message: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """A message whose tool calls have arguments of the kind that `convert` makes; those it can't convert stay.

    Where there are none, or an empty text, as some clients send, they are an empty object.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        if isinstance(call.get("function"), Mapping):
            arguments = call["function"].get("arguments") or {}
            if isinstance(arguments, str) == (convert is json.loads):
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    arguments = convert(arguments)
            call = {**call, "function": {**call["function"], "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _choose_template(tokenizer: Tokenizer, with_tools: bool) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        name = "tool_use" if with_tools and "tool_use" in template else "default"
        if name not in template:
            raise Error(f"this model's chat templates are {sorted(template)}: none of them is named 'default'")
        template = template[name]
    if not isinstance(template, str) or not template:
        raise Error(
            "this model has no chat template: give a text prompt instead of messages, "
            "or put a chat_template.jinja into the model's folder"
        )
    return template


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its content as one string, or None for an assistant that only calls tools."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        raise Error(f"messages[{index}] has no role: each message is an object with a role and content")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls and not (isinstance(calls, Sequence) and all(isinstance(call, Mapping) for call in calls)):
        raise Error(f"messages[{index}].tool_calls must be a list of objects")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "\n".join(_part(index, i, part) for i, part in enumerate(content))
    elif content is None and not calls:
        raise Error(f"messages[{index}] has no content: give a string or a list of text parts")
    elif content is not None and not isinstance(content, str):
        raise Error(f"messages[{index}].content is a {type(content).__name__}: give a string or a list of text parts")
    return {**message, "content": content}


def _part(index: int, i: int, part: object) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise Error(f"messages[{index}].content[{i}] is a part of type {kind!r}: this model takes text parts only")
    return text


def _strings(value: Any) -> Iterator[str]:
    """Every string inside nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _unused_characters(texts: list[str]) -> tuple[str, str]:
    """Two characters that occur in none of the texts."""
    used = set().union(*map(set, texts))
    free = (c for c in iter(lambda: chr(_MARKS.start + secrets.randbelow(len(_MARKS))), "") if c not in used)
    first = next(free)
    return first, next(c for c in free if c != first)


def _interrupter(tokenizer: Tokenizer, mark: str) -> Callable[[Any], Any]:
    """A function that puts `mark` behind the first character of every spelled special token, however deep it is.

    The end of a string counts too where it begins a special token, as the template may put two strings together.
    """
    starts, beginnings = tokenizer.special_starts, tokenizer.special_beginnings
    longest = max(map(len, beginnings), default=0)

    def inside(value: str) -> str:
        return starts.sub(lambda found: found.group() + mark, value)

    def text(value: str) -> str:
        value = inside(value)
        for length in range(min(len(value), longest), 0, -1):
            if value[-length:] in beginnings:
                at = len(value) - length + 1
                return value[:at] + mark + value[at:]
        return value

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, Mapping):
            return {inside(key) if isinstance(key, str) else key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(item) for item in value]
        return value

    return walk
