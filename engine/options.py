"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from halfturn.console import status

if TYPE_CHECKING:
    from halfturn.model import Model
    from halfturn.sampling import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


class KVBits(click.ParamType):
    """`8` for both, or `8,4` for keys and values."""

    name = "BITS"
    allowed = (16, 8, 4)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) > 2 or any(part.strip() not in map(str, self.allowed) for part in parts):
            self.fail(f"{value!r} is not 16, 8 or 4, nor two of them such as 8,4 (keys, values)", param, ctx)
        numbers = [int(part) for part in parts]
        return numbers[0], numbers[-1]


class ApiKey(click.ParamType):
    """Not empty, as that of a shell variable that is not set would be: no client could send it."""

    name = "KEY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("the key is empty: give one, or leave the option out", param, ctx)
        return str(value).strip()


class Batches(click.ParamType):
    """Batch sizes such as `1,2,4,8`."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            sizes = (0,)
        if min(sizes) < 1 or max(sizes) > 1024 or len(set(sizes)) != len(sizes):
            self.fail(f"{value!r} is not a list of different batch sizes from 1 to 1024, such as 1,2,4,8", param, ctx)
        return sizes


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads.  [default: one a core]"
)


def _apply(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def engine_options(function: F) -> F:
    """--device --mode --kv-bits --threads: where and how the model runs."""
    return _apply(
        function,
        [
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
            click.option(
                "--mode",
                type=click.Choice(["auto", "a8", "f16"]),
                default="auto",
                show_default=True,
                help="Products with 8-bit (a8) or half-precision (f16) activations.",
            ),
            click.option(
                "--kv-bits",
                type=KVBits(),
                default="8",
                show_default=True,
                help="Bits of the KV cache: 16, 8 or 4; two numbers set keys and values apart.",
            ),
            threads_option,
        ],
    )


def context_option(function: F) -> F:
    return _apply(
        function,
        [
            click.option(
                "--context",
                type=click.IntRange(2),
                metavar="N",
                help="Longest prompt plus reply in tokens.  [default: what the model was trained for, at most 4096]",
            )
        ],
    )


# Each where neither the command line nor the model's generation_config.json says anything: calm, but not repetitive.
FALLBACKS = {"temperature": 0.7, "top_p": 0.95}


def load_model(path: str, context: int | None, **settings: Any) -> Model:
    """For commands that run one request at a time: the KV cache holds one context. `settings` go to Model.load."""
    from halfturn.model import DEFAULT_CONTEXT, Model

    with status(f"loading {path}"):
        return Model.load(path, context=context, kv_tokens=context or DEFAULT_CONTEXT, **settings)


def sampling_options(function: F) -> F:
    """Options named after the fields of SamplingParams; sampling_params() reads them."""
    return _apply(
        function,
        [
            click.option(
                "--max-tokens", type=click.IntRange(1), metavar="N", help="Longest reply.  [default: until it ends]"
            ),
            click.option("--min-tokens", type=click.IntRange(0), metavar="N", help="No end before this many tokens."),
            click.option("--temperature", type=float, metavar="N", help="0 always takes the likeliest token."),
            click.option(
                "--top-k", type=click.IntRange(0), metavar="N", help="Draw from the K likeliest tokens; 0 is off."
            ),
            click.option(
                "--top-p", type=float, metavar="N", help="Draw from the likeliest tokens that hold this probability."
            ),
            click.option(
                "--min-p", type=float, metavar="N", help="Drop tokens below this fraction of the likeliest one's."
            ),
            click.option(
                "--repetition-penalty", type=float, metavar="N", help="Above 1: tokens seen before get less likely."
            ),
            click.option(
                "--presence-penalty", type=float, metavar="N", help="-2 to 2, once per token already in the reply."
            ),
            click.option(
                "--frequency-penalty", type=float, metavar="N", help="-2 to 2, for each time a token is in the reply."
            ),
            click.option("--seed", type=click.IntRange(0), metavar="N", help="The same seed draws the same reply."),
            click.option("--stop", multiple=True, metavar="TEXT", help="Ends the reply before this text; repeatable."),
            click.option("--ignore-eos", is_flag=True, default=None, help="Never end by itself."),
        ],
    )


def sampling_params(given: Mapping[str, Any], model: Model) -> SamplingParams:
    """What the command line says, then the model's generation_config.json, then the fallbacks above; validated."""
    from halfturn.sampling import default_params

    asked = {key: value for key, value in given.items() if value is not None and value != ()}
    params = replace(default_params(model.generation_config, **FALLBACKS), **asked)
    params.validate(model.native.vocab_size)
    return params
