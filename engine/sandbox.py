"""Jinja for chat templates: Hugging Face's dialect, without access to Python, and bounded in time and memory.

A template comes with a downloaded model, so it is not trusted. jinja2's immutable sandbox keeps it from reaching
Python; what is left is running for ever or filling the memory. Operators and functions that can make much from little
are checked before they run, and a trace of the template's own lines looks at the clock and at the memory in use.
"""

from __future__ import annotations

import datetime
import json
import operator
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from halfturn.error import Error
from halfturn.machine import peak_memory

MAX_SECONDS = 5.0
MAX_CHARACTERS = 20_000_000  # of one value or of the output
MAX_WRAPPED = 100_000  # characters: wordwrap takes quadratic time
MAX_NUMBER = 1_000_000  # as an argument: a width, a count
MAX_GROWTH = 512 << 20  # bytes of resident memory

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "*": operator.mul,
    "**": operator.pow,
    "%": operator.mod,
}
_GROWING = ("batch", "center", "format", "indent", "join", "replace", "round", "slice", "truncate", "wordwrap")
_WIDE = re.compile(r"\d{5,}|%[^%]*\*|\{[^{}]*\{")  # a width of five digits, or one that an argument gives
_FILE = "<template>"


class _Refusal(TemplateError):
    """The template itself refuses the conversation: raise_exception()."""


class _Generation(Extension):
    """{% generation %} marks the model's own words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(_OPERATORS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _bound(len(left) * right if _sized(left) and isinstance(right, int) else 0)
            _bound(len(right) * left if _sized(right) and isinstance(left, int) else 0)
        elif operator == "+" and _sized(left) and _sized(right):
            _bound(len(left) + len(right))
        elif operator == "**" and not (abs(left) <= MAX_NUMBER and abs(right) <= 64):
            raise SecurityError(f"it raises {left} to the power of {right}")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        result = _OPERATORS[operator](left, right)
        if isinstance(result, int) and abs(result) > 2**1024:
            raise SecurityError("it makes a number of more than 1024 bits")
        return result

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Methods of text and numbers that can make much from little: ljust(width), replace(old, new) and their like.
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            args = _listed(args)
            _check_growth(getattr(obj, "__name__", ""), (owner, *args), kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def _sized(value: object) -> bool:
    return isinstance(value, (str, bytes, list, tuple))


def _bound(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise SecurityError(f"it makes a value of {length} items, more than the {MAX_CHARACTERS} allowed")


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with iterators made lists, whose length can be checked."""
    return tuple(list(islice(a, MAX_NUMBER)) if isinstance(a, Iterator) else a for a in args)


def _check_format(pattern: str) -> None:
    if _WIDE.search(pattern):
        raise SecurityError(f"it formats text with a width that is too large or not fixed: {pattern[:80]!r}")


def _check_growth(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bounds what a function or filter can make of its arguments; args[0] is the value that it works on."""
    value, rest = args[0], [*args[1:], *kwargs.values()]
    for number in rest:
        if isinstance(number, int) and abs(number) > MAX_NUMBER:
            raise SecurityError(f"it calls {name} with {number}, more than the {MAX_NUMBER} allowed")
    sizes = [len(other) for other in rest if isinstance(other, (str, bytes, list, tuple))]
    if name in ("replace", "join", "translate") and isinstance(value, (str, list, tuple)) and sizes:
        _bound((len(value) + 1) * max(sizes))
    if name == "translate" and rest and isinstance(rest[0], dict):
        _bound(len(value) * max((len(new) for new in rest[0].values() if isinstance(new, str)), default=1))
    if name == "format" and isinstance(value, str):
        _check_format(value)
    if name == "wordwrap" and isinstance(value, str) and len(value) > MAX_WRAPPED:
        raise SecurityError(f"it wraps a text of {len(value)} characters, more than the {MAX_WRAPPED} allowed")
    if name == "indent" and isinstance(value, str):
        _bound(len(value) + value.count("\n") * max([*sizes, *(n for n in rest if isinstance(n, int))], default=4))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is checked before it runs; jinja2 reads its calling convention from its attributes."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args = _listed(args)
        own = [a for a in args if not isinstance(a, (Environment, EvalContext, Context))]
        _check_growth(name, tuple(own), kwargs)
        return function(*args, **kwargs)

    run.__dict__.update(function.__dict__)
    return run


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    """As in transformers: no escapes for HTML, and none for characters beyond ASCII."""
    if isinstance(indent, int) and indent > 100:
        raise SecurityError(f"it indents json by {indent}, more than the 100 allowed")
    if isinstance(value, Undefined):
        raise TemplateError(f"tojson of {value._undefined_name!r}, which is not defined")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def _raise_exception(message: str) -> None:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200:
        raise SecurityError("it asks for a date with a pattern of more than 200 characters")
    return datetime.datetime.now().strftime(pattern)


class Program:
    """A compiled template. render() may be called from several threads."""

    def __init__(self, source: str) -> None:
        # optimized=False: constants are computed when the template runs, under its limits, not when it is compiled.
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
        )
        environment.filters.update({name: _bounded(name, environment.filters[name]) for name in _GROWING})
        del environment.globals["lipsum"]  # makes text of any length
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            parsed = environment.parse(source, filename=_FILE)
            self.variables = meta.find_undeclared_variables(parsed)  # which it may read
            code = environment.compile(parsed, filename=_FILE)
            self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise Error(f"the chat template is not valid{f' (line {line})' if line else ''}: {error}") from error
        except (RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise Error(f"the chat template can't be compiled: {type(error).__name__}: {error}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """The text. Errors of the template, its own refusals included, are raised as Error."""
        before = sys.gettrace()
        try:
            sys.settrace(_Watch().frame)
            return self._text(variables)
        except _Refusal as refusal:
            raise Error(f"the chat template refuses this conversation: {refusal}") from refusal
        except SecurityError as error:
            raise Error(f"the chat template was stopped: {error}") from error
        except Exception as error:
            raise Error(f"the chat template failed: {type(error).__name__}: {error}") from error
        finally:
            sys.settrace(before)

    def _text(self, variables: dict[str, Any]) -> str:
        parts, length = [], 0
        for part in self._template.generate(variables):
            parts.append(part)
            length += len(part)
            _bound(length)
        return "".join(parts)


class _Watch:
    """A trace function that stops a template which runs too long or fills the memory; about 1 us a line."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._memory = peak_memory() + MAX_GROWTH

    def frame(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename == _FILE else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it ran for more than {MAX_SECONDS:g} s")
        if peak_memory() > self._memory:
            raise SecurityError(f"it took more than {MAX_GROWTH >> 20} MiB of memory")
        return self._line
