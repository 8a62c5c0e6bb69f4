"""The Generator over the fake native engine: streaming, limits, cancelling, failures, threads."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fake_native
from fake_native import BYTE_IDS, expected
from halfturn import Generator, SamplingParams
from halfturn.error import ContextError, Error
from halfturn.job import Job, Output, Piece
from waiting import until

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
Start = Callable[..., Generator]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def greedy(prompt: list[int], count: int) -> list[int]:
    """What the hash draws with the end of text banned."""
    tokens: list[int] = []
    for _ in range(count):
        token = expected([*prompt, *tokens], 1)[0]
        tokens.append(token + 1 if token == 258 else token)
    return tokens


# Text and streaming


def test_stream_is_the_whole_text_in_pieces(start: Start) -> None:
    pieces = list(start("Hello wörld 🦄!").stream("hi", GREEDY))
    # 18 bytes and then, as the end of text is banned, two tokens beyond the vocabulary of text.
    assert text_of(pieces) == "Hello wörld 🦄!"
    assert [p.text for p in pieces[:8]] == ["H", "e", "l", "l", "o", " ", "w", "ö"]
    assert pieces[7].token_ids == [BYTE_IDS[0xC3], BYTE_IDS[0xB6]]
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_end_of_text(start: Start) -> None:
    generator = start("Bye")
    job = generator.submit("a", params=SamplingParams(temperature=0))
    pieces = list(job)
    output = job.result()
    assert output.text == text_of(pieces) == "Bye"
    assert (output.finish_reason, output.stop_reason, pieces[-1].finish_reason) == ("stop", 258, "stop")
    assert output.token_ids == [i for p in pieces for i in p.token_ids] == [*(BYTE_IDS[b] for b in b"Bye"), 258]
    assert output.prompt_tokens == job.prompt_tokens == 1 and job.done


def test_tokens_are_those_of_the_model(start: Start) -> None:
    generator = start()
    outputs = generator.generate([[1, 2, 3], [5] * 70, "text"], GREEDY)
    prompts = [[1, 2, 3], [5] * 70, [BYTE_IDS[b] for b in b"text"]]
    for prompt, output in zip(prompts, outputs):
        assert output.token_ids == greedy(prompt, 20) and output.finish_reason == "length"
    assert generator.stats()["pages_used"] == 0


def test_character_that_never_ends(start: Start) -> None:
    output = start(b"ab\xf0\x9f").generate(["x"], SamplingParams(temperature=0))[0]
    assert output.text == "ab\ufffd"


def test_messages_and_prompts(start: Start) -> None:
    generator = start("ok")
    job = generator.submit(messages=[{"role": "user", "content": "Hi"}], params=GREEDY)
    assert job.prompt_tokens == 1 + len("user\nHi") + 2 + 1 + len("assistant\n")
    assert generator.submit(prompt="<|im_start|>a", params=GREEDY).prompt_tokens == 2  # a template written by hand
    assert generator.submit(messages=[{"role": "user", "content": "a"}]).result().text == "ok"


# Ends


def test_no_limit_ends_with_the_context(start: Start) -> None:
    output = start(script=lambda tokens, drawn: 65, context=64).generate([[1] * 10])[0]
    assert (len(output.token_ids), output.finish_reason) == (54, "length")


# Settings


def test_seeds(start: Start) -> None:
    generator = start()
    one, two, other = (SamplingParams(seed=seed, max_tokens=20) for seed in (7, 7, 8))
    drawn = [generator.generate([[1]], params)[0].token_ids for params in (one, two, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    fresh = [output.token_ids for output in generator.generate([[1]] * 3, SamplingParams(max_tokens=20))]
    assert fresh[0] != fresh[1] != fresh[2]


def test_sampler_gets_every_setting(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fake_native.Sampler] = []

    class Recording(fake_native.Sampler):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self)

    monkeypatch.setattr(fake_native, "Sampler", Recording)
    settings: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {4: 1.5},
        "seed": 9,
        "logprobs": 2,
    }
    start().generate([[1, 2]], SamplingParams(max_tokens=1, ignore_eos=True, **settings))
    sampler = made[0]
    assert {key: getattr(sampler, key) for key in settings} == settings
    assert sampler.banned == [258] and sampler.accepted[:2] == [1, 2]


def test_logprobs(start: Start) -> None:
    job = start("wö").submit("x", params=SamplingParams(temperature=0, logprobs=3))
    pieces, output = list(job), job.result()
    assert output.logprobs is not None and [p.token_id for p in output.logprobs] == output.token_ids
    assert [entry for p in pieces for entry in p.logprobs or []] == output.logprobs
    assert [len(p.logprobs or []) for p in pieces] == [1, 2, 1]
    assert output.logprobs[0].logprob == -0.5 and len(output.logprobs[0].top) == 3
    assert start("a").generate(["x"])[0].logprobs is None


def test_defaults_come_from_generation_config(start: Start, tmp_path: Path) -> None:
    generator = start()
    generator.model.generation_config = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "top_k": None}
    assert generator.model.default_params() == SamplingParams(temperature=0.6, top_p=0.9)
    generator.model.generation_config = {"do_sample": False}
    assert generator.model.default_params().temperature == 0


def test_timings(start: Start) -> None:
    timings = start("Hello", step_seconds=0.01).generate(["x"])[0].timings
    assert timings.time_to_first_token_s is not None and timings.decode_tokens_per_second is not None
    assert 0 <= timings.queue_s < timings.time_to_first_token_s < timings.total_s
    assert 0 < timings.decode_tokens_per_second < 100
    assert start("").generate(["x"])[0].timings.decode_tokens_per_second is None


def test_equal_prompts_share_the_prefix(start: Start) -> None:
    generator = start()
    first, second = (generator.generate([list(range(100))], GREEDY)[0] for _ in range(2))
    assert (first.timings.cached_prompt_tokens, second.timings.cached_prompt_tokens) == (0, 96)
    assert first.token_ids == second.token_ids


# Refusals


def test_bad_requests_are_refused_at_submit(start: Start) -> None:
    generator = start(context=64)
    for call, sentence in [
        (lambda: generator.submit(), "either a prompt or messages"),
        (lambda: generator.submit("a", messages=[]), "either a prompt or messages"),
        (lambda: generator.submit(""), "the prompt is empty"),
        (lambda: generator.submit([]), "the prompt is empty"),
        (lambda: generator.submit([1, 300]), "the prompt holds 300: token ids are whole numbers from 0 to 299"),
        (lambda: generator.submit(["a"]), "a prompt is text or a list of token ids"),
        (lambda: generator.submit(5), "a prompt is text or a list of token ids"),
        (lambda: generator.submit("a", tools=[{}]), "need messages"),
        (lambda: generator.submit([1, 2], tools=[{}]), "need messages"),
        (lambda: generator.submit([1, 2], enable_thinking=True), "need messages"),
        (lambda: generator.submit(messages=5), "messages is 5: it must be a list"),
        (lambda: generator.submit(b"hello"), "not bytes"),
        (lambda: generator.submit({1, 2}), "not set"),
        (lambda: generator.submit("a", params={"top_p": 1}), "it must be SamplingParams"),
        (lambda: generator.submit("a", params=SamplingParams(temperature=10**400)), "temperature is a number of 1329"),
        (lambda: generator.generate(5), "takes a list of prompts"),
        (lambda: Generator(generator.model, max_batch="a"), "max_batch is 'a'"),
        (lambda: Generator(generator.model, step_tokens=0), "step_tokens is 0"),
        (lambda: generator.submit("a", params=SamplingParams(top_p=2)), "top_p is 2"),
        (lambda: generator.generate("a"), "takes a list of prompts"),
    ]:
        with pytest.raises(Error, match=sentence):
            call()
    with pytest.raises(ContextError, match="the prompt has 64 tokens, the context holds 64"):
        generator.submit([1] * 64)
    with pytest.raises(ContextError, match="the prompt has 60 tokens and 5 new ones, the context holds 64"):
        generator.submit([1] * 60, params=SamplingParams(max_tokens=5))
    assert len(generator.generate([[1] * 60], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_an_end_of_text_beyond_the_vocabulary_is_no_token(start: Start) -> None:
    generator = start("Hello")
    generator.model.tokenizer.eos_token_ids |= {2**30}
    assert generator.generate(["x"], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0].text == "Hel"


# Whose job it is


def test_a_job_keeps_its_generator(tmp_path: Path) -> None:
    model = fake_native.load(tmp_path, "Hello", step_seconds=0.005)
    assert Generator(model).submit("x", params=SamplingParams(temperature=0)).result().text == "Hello"
    assert text_of(list(Generator(model).stream("x", SamplingParams(temperature=0)))) == "Hello"


def test_a_listener_that_raises_ends_its_own_request_only(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002)
    other = generator.submit("x", params=SamplingParams(max_tokens=50))
    seen = []

    def broken(piece: Piece) -> None:
        seen.append(piece)
        raise ValueError("a bug")

    job = generator.submit("y", params=SamplingParams(max_tokens=50), on_piece=broken)
    with pytest.raises(Error, match="ValueError: a bug"):
        job.result(timeout=10)
    assert len(seen) == 1 and other.result(timeout=10).text == "b" * 50
    last = generator.submit("z", params=SamplingParams(max_tokens=1), on_piece=broken)
    until(lambda: last.done)
    assert generator.generate(["x"], SamplingParams(max_tokens=5))[0].text == "b" * 5
    with pytest.raises(Error, match="pieces go to on_piece"):
        next(iter(last))


def test_a_listener_may_even_exit(start: Start) -> None:
    """Its own request fails, whichever piece it was, and the same way each time that one asks."""
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002)
    other = generator.submit("x", params=SamplingParams(max_tokens=30))

    def at_end(piece: Piece) -> None:
        if piece.finish_reason:
            sys.exit()

    params = SamplingParams(max_tokens=2)
    jobs = [generator.submit("y", params=params, on_piece=lambda _: sys.exit(3)) for _ in range(3)]
    jobs += [generator.submit("z", params=params, on_piece=at_end) for _ in range(10)]
    for job in jobs:
        for _ in range(2):
            with pytest.raises(Error, match="on_piece failed: SystemExit"):
                job.result(timeout=10)
    assert other.result(timeout=10).finish_reason == "length" and generator.alive


def test_closing_twice_waits_twice(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.02)
    for _ in range(5):
        generator.submit("x", params=SamplingParams(max_tokens=200))
        first = threading.Thread(target=generator.close)
        first.start()
        generator.close()
        Generator(generator.model).close()
        first.join()
        generator = Generator(generator.model)
    generator.close()


def test_closing_again_after_ctrl_c_waits_for_the_end(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.5)
    job = generator.submit("x")
    until(lambda: generator.stats()["running"])
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        generator.close()
    generator.close()
    Generator(generator.model).close()  # "has a generator already" if that one had not ended
    assert job.result().finish_reason == "cancelled"
    timer.join()


def test_a_closed_generator_counts_nothing(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002, max_batch=2)
    jobs = [generator.submit("x", params=SamplingParams(max_tokens=200)) for _ in range(5)]
    until(lambda: generator.stats()["running"])
    generator.close()
    assert {job.result().finish_reason for job in jobs} == {"cancelled"}
    stats = generator.stats()
    assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork with threads: that is what is tested
def test_a_forked_process_has_to_load_its_own(start: Start) -> None:
    generator = start("Hello", step_seconds=0.01)
    job = generator.submit("x")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert not generator.alive
            with pytest.raises(Error, match="forked from"):
                generator.submit("x")
            with pytest.raises(Error, match="forked from"):
                Generator(generator.model)
            with pytest.raises(Error, match="forked from"):
                job.result()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert generator.generate(["x"], SamplingParams(temperature=0))[0].text == "Hello"


# Leaving early


def test_cancel(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.005)
    job = generator.submit("x")
    first = next(iter(job))
    assert first.text
    output = job.result(timeout=10)
    assert output.finish_reason == "cancelled" and output.text.startswith(first.text)
    until(lambda: generator.stats()["pages_used"] == 0)
    job.cancel()  # again, and after the end: nothing happens


def test_cancelled_while_waiting(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.005, max_batch=1)
    running, waiting = generator.submit("x"), generator.submit("y")
    waiting.cancel()
    output = waiting.result(timeout=10)
    assert (output.finish_reason, output.token_ids) == ("cancelled", [])
    assert not running.done


def test_a_loop_that_is_left_cancels(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002)
    for _ in generator.stream("x"):
        break
    until(lambda: generator.stats()["running"] == 0)
    stream = generator.stream("x")
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            raise KeyboardInterrupt
    del stream
    until(lambda: generator.stats()["running"] == 0)


def test_a_dropped_job_is_cancelled(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002)
    job = generator.submit("x")
    until(lambda: generator.stats()["running"] == 1)
    del job
    gc.collect()
    until(lambda: generator.stats()["running"] == 0)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system can't send a thread a signal")
@pytest.mark.parametrize("wait", [lambda job: job.result(), lambda job: list(job)], ids=["result", "stream"])
def test_ctrl_c_cancels(start: Start, wait: Callable[[Job], Any]) -> None:
    """The waiting is over, and so is the request; nothing is drawn that would end the wait by itself."""
    release = threading.Event()
    generator = start(fail=lambda step, items: release.wait(10) and None)
    job = generator.submit("x")
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        wait(job)
    release.set()
    assert job.result(timeout=10).finish_reason == "cancelled"


def test_result_timeout(start: Start) -> None:
    job = start(script=lambda tokens, drawn: 65, step_seconds=0.01).submit("x")
    with pytest.raises(TimeoutError):
        job.result(timeout=0.02)


def test_close_cancels_and_refuses(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.005, max_batch=1)
    jobs = [generator.submit("x") for _ in range(3)]
    generator.close()
    assert [job.result(timeout=10).finish_reason for job in jobs] == ["cancelled"] * 3
    assert not generator.alive
    with pytest.raises(Error, match="the generator is closed"):
        generator.submit("x")
    generator.close()


def test_dropped_generator_ends_its_thread(start: Start, tmp_path: Path) -> None:
    generator = Generator(fake_native.load(tmp_path / "other", "hi"))
    thread = generator._engine._thread
    del generator
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


# Failures


def test_failed_step_fails_only_who_fails_alone(start: Start) -> None:
    """The engine says no to every step with token 13 in it; the other requests don't notice."""

    def fail(step: int, items: Sequence[fake_native.Item]) -> None:
        if any(13 in item.tokens for item in items):
            raise Error("thirteen is out of range")

    generator = start(fail=fail)
    jobs = [generator.submit(prompt, params=GREEDY) for prompt in ([1], [2, 13], [3])]
    with pytest.raises(Error, match="thirteen is out of range"):
        jobs[1].result(timeout=10)
    assert [jobs[i].result(timeout=10).token_ids for i in (0, 2)] == [greedy([1], 20), greedy([3], 20)]
    assert generator.alive and generator.stats()["pages_used"] == 0
    assert generator.generate([[1]], GREEDY)[0].token_ids == greedy([1], 20)


def test_error_of_one_item(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine may answer one item with a sentence instead of a token."""
    plain = fake_native.Model.step

    def step(self: fake_native.Model, items: Sequence[fake_native.Item]) -> list[Any]:
        return ["no token may be drawn" if 13 in i.tokens else s for i, s in zip(items, plain(self, items))]

    monkeypatch.setattr(fake_native.Model, "step", step)
    generator = start()
    good, bad = generator.submit([1], params=GREEDY), generator.submit([13], params=GREEDY)
    with pytest.raises(Error, match="no token may be drawn"):
        bad.result(timeout=10)
    assert good.result(timeout=10).token_ids == greedy([1], 20)


def test_error_in_a_stream_comes_after_its_text(start: Start) -> None:
    def fail(step: int, items: Sequence[fake_native.Item]) -> None:
        if step == 4:
            raise RuntimeError("out of luck")

    stream, shown = start("Hello", fail=fail).stream("x", GREEDY), []
    with pytest.raises(Error, match="the request failed: RuntimeError: out of luck"):
        for piece in stream:
            shown.append(piece)
    assert text_of(shown) == "Hel" and shown[-1].finish_reason == "error"


def test_a_detokenizer_that_fails_ends_its_own_request_only(start: Start, tmp_path: Path) -> None:
    """The library panics where a decoder strips more characters from the end of a token than it has."""
    generator = start(script=lambda tokens, drawn: tokens[0], step_seconds=0.002)
    file = tmp_path / "model" / "tokenizer.json"
    decoder = {"type": "Strip", "content": "b", "start": 0, "stop": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": decoder}))
    good, bad = (generator.submit([token], params=SamplingParams(max_tokens=20)) for token in (BYTE_IDS[97], 65))
    with pytest.raises(Error, match=r"tokenizer\.json is not a usable tokenizer"):
        bad.result(timeout=10)
    assert good.result(timeout=10).text == "a" * 20
    assert generator.alive and generator.stats()["pages_used"] == 0


def test_an_engine_thread_that_ends_leaves_nobody_waiting(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a detokenizer raises, and whichever request can't even be ended."""

    class Exit(BaseException):
        pass

    def fail(*_: object) -> str:
        raise Exit("a bug")

    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002, max_batch=2)
    detokenizer = SimpleNamespace(add=fail, flush=fail)
    monkeypatch.setattr(generator.model.tokenizer, "detokenizer", lambda at_start: detokenizer)
    jobs = [generator.submit("x", params=SamplingParams(max_tokens=20)) for _ in range(5)]
    for job in jobs:
        with pytest.raises(Error, match="the engine thread has ended: Exit: a bug"):
            job.result(timeout=10)
    assert not generator.alive


def test_dead_engine_thread_is_reported(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002, max_batch=1)
    jobs = [generator.submit("x") for _ in range(3)]
    next(iter(jobs[0]))

    def broken() -> None:
        raise MemoryError("no page table")

    monkeypatch.setattr(generator._engine.scheduler, "schedule", broken)
    for job in jobs[1:]:
        with pytest.raises(Error, match="the engine thread has ended: MemoryError: no page table"):
            job.result(timeout=10)
    until(lambda: not generator.alive)
    with pytest.raises(Error, match="the engine thread has ended"):
        generator.submit("x")
    generator.close()


# Threads


def test_many_threads(start: Start) -> None:
    """Submits, streams, cancels from eight threads; everything that ends by itself has its own tokens."""
    generator = start(max_batch=5, pages=20)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in range(6):
            prompt = [seed, i, *range(i * 7)]
            if i % 3 == 2:
                job = generator.submit(prompt, params=GREEDY)
                next(iter(job))
                continue
            pieces = list(generator.stream(prompt, GREEDY))
            if [t for p in pieces for t in p.token_ids] != greedy(prompt, 20):
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    until(lambda: generator.stats()["pages_used"] == 0)


def test_asyncio(start: Start) -> None:
    generator = start("Hello wörld")

    async def read(job: Job) -> str:
        return "".join([piece.text async for piece in job])

    async def main() -> list[str]:
        return await asyncio.gather(*(read(generator.submit("x")) for _ in range(5)))

    assert asyncio.run(main()) == ["Hello wörld"] * 5


def test_asyncio_left_early(start: Start) -> None:
    generator = start(script=lambda tokens, drawn: 65, step_seconds=0.002)

    async def main() -> Output:
        job = generator.submit("x")
        stream = job.__aiter__()
        await stream.__anext__()
        await stream.aclose()
        return await asyncio.to_thread(job.result, 10)

    assert asyncio.run(main()).finish_reason == "cancelled"


def test_pieces_by_callback(start: Start) -> None:
    pieces: list[Piece] = []
    output = start("Hello").submit("x", params=SamplingParams(temperature=0), on_piece=pieces.append).result()
    until(lambda: pieces and pieces[-1].finish_reason)
    assert text_of(pieces) == output.text == "Hello"
