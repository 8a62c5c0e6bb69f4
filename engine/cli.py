"""`halfturn COMMAND`: each command reads its options, calls one module and prints what it returns."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from halfturn import __version__
from halfturn.command import LazyGroup, MainGroup
from halfturn.console import Counter, note, print_json, speed, write
from halfturn.options import (
    ApiKey,
    Batches,
    context_option,
    engine_options,
    json_option,
    load_model,
    sampling_options,
    sampling_params,
)
from halfturn.prompt import clean, prompt_text

if TYPE_CHECKING:
    from halfturn.model import Device, Mode

model_argument = click.argument("model", metavar="MODEL")


@click.group(
    cls=MainGroup,
    name="halfturn",
    lazy={
        "convert": (
            "halfturn.converter.cli:convert_command",
            "Turn a Hugging Face or GGUF model into a Halfturn checkpoint.",
        )
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="halfturn")
@click.option("--debug", is_flag=True, help="Show the traceback of an unexpected failure.")
def main(debug: bool) -> None:
    """Rotated mixed-precision language models on CPUs and NVIDIA cards.

    MODEL is the folder of a Halfturn checkpoint, as `halfturn convert` writes it. Results go to stdout, progress to
    stderr.
    """


@main.command()
@model_argument
@click.option("--prompt", metavar="TEXT", help="What the model continues.")
@click.option(
    "--prompt-file", metavar="FILE", help="The same from a file; - is stdin, also read where nothing is given."
)
@click.option(
    "--chat/--raw", "as_chat", default=False, help="Put the prompt into the model's chat template, or not (default)."
)
@click.option("--system", metavar="TEXT", help="System message, with --chat.")
@sampling_options
@context_option
@engine_options
@click.option("--quiet", is_flag=True, help="No summary on stderr.")
@json_option
def generate(
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    as_chat: bool,
    system: str | None,
    context: int | None,
    device: str,
    mode: str,
    kv_bits: tuple[int, int],
    threads: int | None,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt.

    The text streams to stdout. Sampling options default to the model's generation_config.json, else to temperature 0.7
    and top-p 0.95. --json prints text, tokens (how many were drawn), token_ids, finish_reason, prompt_tokens,
    time_to_first_token_s and decode_tokens_per_second (null for a single token).
    """
    text = prompt_text(prompt, prompt_file)
    if system is not None and not as_chat:
        raise click.UsageError("--system needs --chat")
    loaded = load_model(model, device=device, mode=mode, kv_bits=kv_bits, context=context, threads=threads)
    from halfturn.generator import Generator

    params = sampling_params(sampling, loaded)
    generator = Generator(loaded, max_batch=1)
    try:
        if as_chat:
            messages = [{"role": "system", "content": clean("--system", system)}] if system is not None else []
            messages.append({"role": "user", "content": text})
            job = generator.submit(messages=messages, params=params)
        else:
            job = generator.submit(prompt=text, params=params)
        for piece in job:
            if not as_json:
                write(piece.text)
        output = job.result()
    finally:
        generator.close()
    if as_json:
        print_json(
            {
                "text": output.text,
                "tokens": len(output.token_ids),
                "finish_reason": output.finish_reason,
                "prompt_tokens": output.prompt_tokens,
                "time_to_first_token_s": output.timings.time_to_first_token_s,
                "decode_tokens_per_second": output.timings.decode_tokens_per_second,
                "token_ids": output.token_ids,
            }
        )
        return
    if not output.text.endswith("\n"):
        write("\n")
    if not quiet:
        why: str = output.finish_reason
        if why == "length":
            why = "--max-tokens reached" if len(output.token_ids) == params.max_tokens else "the context is full"
        note(f"[{speed(output)}; {why}]")


@main.command()
@model_argument
@click.option("--system", metavar="TEXT", help="System message, in place of a loaded one too; /system changes it.")
@click.option("--load", "transcript", metavar="FILE", help="Go on with a conversation that /save wrote.")
@sampling_options
@context_option
@engine_options
@json_option
def chat(
    model: str,
    system: str | None,
    transcript: str | None,
    context: int | None,
    device: str,
    mode: str,
    kv_bits: tuple[int, int],
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk to a model; /help lists what can be typed.

    Ctrl-C stops a reply, Ctrl-D leaves. Messages may also be piped in, one a line. With --json the conversation is
    shown on stderr, and printed as {"messages", "turns", "tokens"} at its end.
    """
    loaded = load_model(model, device=device, mode=mode, kv_bits=kv_bits, context=context, threads=threads)
    from halfturn.generator import Generator
    from halfturn.repl import Repl

    loaded.encode_chat([{"role": "user", "content": "Hi"}])  # a model that has no template is refused at once
    generator = Generator(loaded, max_batch=1)
    try:
        repl = Repl(
            loaded,
            generator,
            sampling_params(sampling, loaded),
            system=None if system is None else clean("--system", system),
            out=sys.stderr if as_json else sys.stdout,
            debug=click.get_current_context().find_root().params.get("debug", False),
        )
        if transcript is not None:
            repl.load(transcript)
            if system is not None:
                repl.conversation.system = system
        repl.run()
    finally:
        generator.close()
    if as_json:
        print_json({"messages": repl.conversation.messages, "turns": repl.turns, "tokens": repl.tokens})


@main.command()
@model_argument
@json_option
def info(model: str, as_json: bool) -> None:
    """Shapes, bits per matrix, and bits per weight three ways."""
    from halfturn.info import describe, show

    facts = describe(model)
    if as_json:
        print_json(facts)
    else:
        show(facts)


@main.group(
    cls=LazyGroup,
    name="eval",
    lazy={
        "kl": (
            "halfturn.converter.cli:eval_kl_command",
            "KL divergence from the model that was converted (needs the convert extra).",
        )
    },
)
def evaluate() -> None:
    """Measure a model's quality on a text."""


@evaluate.command()
@model_argument
@click.option("--text", "path", metavar="FILE", required=True, help="UTF-8 text, tokenized once as it is.")
@click.option(
    "--context", type=click.IntRange(2), metavar="N", default=2048, show_default=True, help="Tokens a window."
)
@click.option(
    "--windows", "count", type=click.IntRange(1), metavar="N", help="Only the first N windows.  [default: all]"
)
@click.option(
    "--wikitext-join",
    is_flag=True,
    help='Take FILE\'s lines as rows of WikiText and join them by blank lines, as papers do ("\\n\\n".join(rows)).',
)
@engine_options
@json_option
def perplexity(
    model: str,
    path: str,
    context: int,
    count: int | None,
    wikitext_join: bool,
    device: str,
    mode: str,
    kv_bits: tuple[int, int],
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity of a text file.

    Windows of --context tokens that don't overlap, no BOS, every token of a window but its first is predicted.
    Published WikiText-2 figures use --wikitext-join on wiki.test.raw and --context 2048. --json prints perplexity,
    tokens (predictions), windows and context.
    """
    from halfturn import evaluate as module

    text = module.read_text(path, wikitext_join)
    loaded = load_model(model, device=device, mode=mode, kv_bits=kv_bits, context=context, threads=threads)
    counter = Counter("window")
    result = module.perplexity(
        loaded, text, context, count, lambda done, total, value: counter(done, total, f"perplexity {value:.3f}")
    )
    counter.close()
    if as_json:
        print_json(result)
    else:
        click.echo(
            f"perplexity {result['perplexity']:.4f}  ({result['tokens']} predictions, {result['windows']} windows)"
        )


@main.command()
@model_argument
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), metavar="N", default=128, show_default=True)
@click.option("--batch", "batches", type=Batches(), default="1,2,4,8", show_default=True, help="Sequences at a time.")
@click.option(
    "--repeat", type=click.IntRange(1), metavar="N", default=5, show_default=True, help="Runs; medians are reported."
)
@engine_options
@json_option
def bench(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    batches: tuple[int, ...],
    repeat: int,
    device: Device,
    mode: Mode,
    kv_bits: tuple[int, int],
    threads: int | None,
    as_json: bool,
) -> None:
    """Prefill and decode speed, beside the memory bandwidth measured in the same run.

    --json prints prefill_tokens_per_second, decode (a list of batch, tokens_per_second, weight_bytes_per_token and
    bandwidth_fraction), read_bandwidth_bytes_per_second, load_seconds, peak_rss_bytes, device and threads, and the
    settings of the run.
    """
    from halfturn import bench as module

    result = module.bench(
        model,
        prompt_tokens,
        new_tokens,
        batches,
        repeat,
        device=device,
        mode=mode,
        kv_bits=kv_bits,
        threads=threads,
        progress=note,
    )
    if as_json:
        print_json(result)
    else:
        module.show(result)


@main.command()
@model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", default=8000, show_default=True, help="0 takes a free one."
)
@click.option("--name", metavar="TEXT", help="The model's id in the API.  [default: the folder's name]")
@click.option("--api-key", type=ApiKey(), help="Clients must send it as a bearer token.")
@click.option("--cors-origin", multiple=True, metavar="URL", help="Web page that may use the server; repeatable.")
@click.option(
    "--max-batch",
    type=click.IntRange(1, 1024),
    metavar="N",
    default=32,
    show_default=True,
    help="Requests that run together; more wait.",
)
@click.option(
    "--kv-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of all requests in the KV cache.  [default: 8 contexts, or what a quarter of the free memory holds]",
)
@click.option("--access-log", is_flag=True, help="One line on stderr for each request.")
@context_option
@engine_options
@json_option
def serve(
    model: str,
    name: str | None,
    api_key: str | None,
    cors_origin: tuple[str, ...],
    access_log: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models, /health.

    Ctrl-C stops it. --json prints {"url", "model"} once requests are answered.
    """
    from halfturn.server.app import Settings
    from halfturn.server.app import serve as run_server

    def ready(url: str, name: str) -> None:
        if as_json:
            print_json({"url": url, "model": name})
        else:
            click.echo(f"{name} is served at {url}/v1 (Ctrl-C stops it)")

    settings = Settings(name=name or "", api_key=api_key, cors_origins=cors_origin, access_log=access_log)
    run_server(model, settings=settings, on_ready=ready, **options)


@main.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """What this machine has, and what would run; exits with 1 if something is missing."""
    from halfturn.doctor import examine, show

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        show(facts)
    if facts["problems"]:
        context.exit(1)
