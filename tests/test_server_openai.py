"""The server through the real `openai` package, as its users see it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

import fake_native
from checkpoints import write_checkpoint
from halfturn import Model, SamplingParams
from live_server import Live, live

REPLY = "Héllo 🙂 wörld. This is the whole answer."
HI: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
HI_TOKENS = len("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") - (
    3 * len("<|im_start|>") + 2 * len("<|im_end|>") - 5  # the tokenizer has one token a byte, and one a special
)


def client(server: Live, **options: Any) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, **options)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Answers everything with REPLY."""
    with live(fake_native.load(tmp_path_factory.mktemp("fixed"), reply=REPLY)) as server:
        yield server


@pytest.fixture(scope="module")
def hashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Every token depends on all tokens before it; few pages, so that requests may preempt each other."""
    with live(fake_native.load(tmp_path_factory.mktemp("hashing"), pages=16), max_batch=8) as server:
        yield server


def test_models(fixed: Live) -> None:
    api = client(fixed)
    assert [model.id for model in api.models.list()] == ["test"]
    assert api.models.retrieve("test").owned_by == "halfturn"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_chat(fixed: Live) -> None:
    answer = client(fixed).chat.completions.create(model="test", messages=HI)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", REPLY)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "test"
    assert answer.system_fingerprint and answer.created > 1.6e9
    assert answer.usage is not None
    drawn = len(REPLY.encode()) + 1  # the end of text is a token too
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (HI_TOKENS, drawn)
    assert answer.usage.total_tokens == HI_TOKENS + drawn


def test_chat_stream(fixed: Live) -> None:
    stream = client(fixed).chat.completions.create(
        model="test", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1 and all(c.object == "chat.completion.chunk" for c in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == len(REPLY.encode()) + 1
    assert usage.prompt_tokens == HI_TOKENS


def test_stream_helper_of_the_package(fixed: Live) -> None:
    with client(fixed).chat.completions.stream(model="test", messages=HI) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == REPLY


def test_content_parts_names_roles_and_tools(fixed: Live) -> None:
    """All kinds of messages reach the template; this template shows text and the names of calls."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = client(fixed).chat.completions.create(model="test", messages=messages, tools=tools, tool_choice="auto")
    assert answer.choices[0].message.content == REPLY
    changed = [{"role": "system"}, {"content": "h\ni"}, {"content": ""}, {}]
    whole = [message | change for message, change in zip(messages, changed)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(fixed.generator.encode(messages=whole, tools=tools))


def test_completion(fixed: Live) -> None:
    api = client(fixed)
    answer = api.completions.create(model="test", prompt="Say hello", max_tokens=100)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (REPLY, "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens == 9
    assert api.completions.create(model="test", prompt="x").usage.completion_tokens == 16  # type: ignore[union-attr]
    echoed = api.completions.create(model="test", prompt="Say: ", max_tokens=100, echo=True)
    assert echoed.choices[0].text == "Say: " + REPLY
    tokens = [fake_native.BYTE_IDS[b] for b in "Sé: ".encode()]
    echoed = api.completions.create(model="test", prompt=tokens, max_tokens=100, echo=True)
    assert echoed.choices[0].text == "Sé: " + REPLY
    chunks = api.completions.create(model="test", prompt="Say: ", max_tokens=100, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Say: " + REPLY


@pytest.mark.parametrize("stop", ["whole", ["zzz", "whole"], ["the whole", "whole answer"]])
def test_stop_is_not_in_the_text(fixed: Live, stop: Any) -> None:
    api = client(fixed)
    before = REPLY[: min(REPLY.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in REPLY)]
    answer = api.chat.completions.create(model="test", messages=HI, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
    chunks = list(api.chat.completions.create(model="test", messages=HI, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before


def test_length_ends_inside_a_character(fixed: Live) -> None:
    answer = client(fixed).chat.completions.create(model="test", messages=HI, max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "H\ufffd"
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def test_chat_logprobs(fixed: Live) -> None:
    def check(content: Any) -> None:
        assert bytes(b for entry in content for b in entry.bytes) == REPLY.encode()  # no end of text
        assert content[0].token == "H" and content[0].logprob == -0.5
        assert [len(entry.top_logprobs) for entry in content] == [3] * len(content)
        assert content[0].top_logprobs[0].token == "H" and content[0].top_logprobs[1].logprob == -1.5

    api = client(fixed)
    asked: Any = {"model": "test", "messages": HI, "logprobs": True, "top_logprobs": 3}
    check(api.chat.completions.create(**asked).choices[0].logprobs.content)
    streamed = [c.choices[0].logprobs for c in api.chat.completions.create(**asked, stream=True)]
    check([entry for logprobs in streamed if logprobs for entry in logprobs.content])
    plain = api.chat.completions.create(model="test", messages=HI, logprobs=True).choices[0].logprobs
    assert plain is not None and plain.content is not None and plain.content[0].top_logprobs == []


def test_completion_logprobs(fixed: Live) -> None:
    api = client(fixed)
    found = api.completions.create(model="test", prompt="x", max_tokens=4, logprobs=2).choices[0].logprobs
    assert found is not None and found.top_logprobs is not None
    assert found.tokens == ["H", "bytes:\\xc3", "bytes:\\xa9", "l"]
    assert found.token_logprobs == [-0.5] * 4 and found.text_offset == [0, 1, 1, 2]
    assert found.top_logprobs[0]["H"] == -0.5 and len(found.top_logprobs[0]) == 2
    found = api.completions.create(model="test", prompt="x", max_tokens=2, logprobs=0).choices[0].logprobs
    assert found is not None and found.top_logprobs == [{"H": -0.5}, {"bytes:\\xc3": -0.5}]
    asked: Any = {"model": "test", "prompt": "x", "max_tokens": 100, "logprobs": 1}
    whole = api.completions.create(**asked).choices[0].logprobs
    assert whole is not None and whole.tokens is not None and whole.tokens[-1] == "."  # and not the end of text
    parts = [chunk.choices[0].logprobs for chunk in api.completions.create(**asked, stream=True)]
    assert [token for part in parts if part for token in part.tokens or ()] == whole.tokens


def test_completion_logprobs_of_a_token_beside_the_best_and_of_a_special_one(tmp_path: Path) -> None:
    """Drawn: "a", a special token, whose name is not in the text, "é" in two tokens, "b"; the likeliest is "x"."""
    ids = [fake_native.BYTE_IDS[b] for b in "aéb".encode()]
    ids.insert(1, 257)
    model = fake_native.load(tmp_path, script=lambda tokens, drawn: ids[drawn])
    step, x = model.native.step, fake_native.BYTE_IDS[ord("x")]
    model.native.step = lambda items: [replace(sample, top=[(x, -0.25)]) for sample in step(items)]
    with live(model) as server:
        asked: Any = {"model": "test", "prompt": "x", "max_tokens": 5, "logprobs": 1}
        choice = client(server).completions.create(**asked).choices[0]
    assert choice.text == "aéb" and choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "<|im_start|>", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert choice.logprobs.text_offset == [0, 1, 1, 1, 2]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] == {"x": -0.25, "a": -0.5}


def test_errors_are_the_package_s_own(fixed: Live) -> None:
    chat = client(fixed).chat.completions
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model="test", messages=HI, temperature=3)
    assert (bad.value.param, bad.value.type, bad.value.status_code) == ("temperature", "invalid_request_error", 400)
    assert "temperature must be at most 2, not 3" in bad.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model="test", messages=[{"role": "user", "content": "x" * 1000}])
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        chat.create(model="gpt-5", messages=HI)
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model="test", messages=HI, response_format={"type": "json_object"})
    assert bad.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model="test", messages=HI, extra_body={"top_q": 1})
    assert bad.value.param == "top_q"


def test_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    with live(fake_native.load(tmp_path, reply="ok"), api_key="right") as server:
        with pytest.raises(openai.AuthenticationError):
            client(server).models.list()
        right = OpenAI(base_url=server.url + "/v1", api_key="right")
        assert right.chat.completions.create(model="test", messages=HI).choices[0].message.content == "ok"


def test_a_failure_while_streaming_is_raised(tmp_path: Path) -> None:
    def fail(step: int, items: Any) -> None:
        if step > 5:
            raise RuntimeError("the cache is on fire")

    with live(fake_native.load(tmp_path, fail=fail, reply=REPLY)) as server:
        stream = client(server).chat.completions.create(model="test", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="the cache is on fire"):
            list(stream)


def test_several_choices_differ_by_their_seeds(hashing: Live) -> None:
    api = client(hashing)
    asked: Any = {"model": "test", "messages": HI, "max_tokens": 20}
    answer = api.chat.completions.create(**asked, n=3, seed=7)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [c.message.content for c in api.chat.completions.create(**asked, n=3, seed=7).choices] == texts
    alone = api.chat.completions.create(**asked, seed=8).choices[0].message.content
    assert alone == texts[1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (HI_TOKENS, 60)

    streamed = ["", "", ""]
    for chunk in api.chat.completions.create(**asked, n=3, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert api.chat.completions.create(**asked).choices != api.chat.completions.create(**asked).choices


def test_prompts_in_every_form(hashing: Live) -> None:
    completions = client(hashing).completions
    asked: Any = {"model": "test", "max_tokens": 8, "temperature": 0}
    texts = ["one", "another prompt", "the third"]
    tokens = [[fake_native.BYTE_IDS[b] for b in text.encode()] for text in texts]
    solo = [completions.create(prompt=text, **asked).choices[0].text for text in texts]
    for prompts in (texts, tokens):
        answer = completions.create(prompt=prompts, n=2, **asked)
        assert [choice.text for choice in answer.choices] == [solo[i // 2] for i in range(6)]
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, tokens))
        assert answer.usage.completion_tokens == 48
    assert completions.create(prompt=tokens[1], **asked).choices[0].text == solo[1]


def test_settings_reach_the_sampler(hashing: Live) -> None:
    chat = client(hashing).chat.completions

    def ask(**settings: Any) -> str:
        extra = {name: settings.pop(name) for name in list(settings) if name in EXTRAS}
        answer = chat.create(model="test", messages=HI, max_tokens=12, temperature=0, extra_body=extra, **settings)
        return answer.choices[0].message.content or ""

    a = fake_native.BYTE_IDS[ord("a")]
    plain = ask()
    assert ask(seed=-1, top_p=0.5, user="me", **{"top_k": -1, "min_p": 0.1}) == plain
    assert ask(logit_bias={str(a): 100}) == "a" * 12
    assert ask(logit_bias={str(a): 100}, stop_token_ids=[a]) == ""
    assert ask(logit_bias={str(a): 100}, stop_token_ids=[a], min_tokens=5) != ""
    assert ask(repetition_penalty=1.5) != plain
    assert ask(frequency_penalty=1) != plain and ask(presence_penalty=1) != plain
    ends: Any = {"model": "test", "messages": HI, "max_tokens": 12, "logit_bias": {"258": 100}}
    assert chat.create(**ends).choices[0].finish_reason == "stop"
    assert chat.create(**ends, extra_body={"ignore_eos": True}).choices[0].finish_reason == "length"


EXTRAS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids")


def test_cached_tokens_are_reported(hashing: Live) -> None:
    chat = client(hashing).chat.completions
    messages: Any = [{"role": "user", "content": "A prompt of its own, which fills two pages of 32."}]
    for cached in (0, 64):
        usage = chat.create(model="test", messages=messages, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == cached


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The compiled engine on a small checkpoint with random weights."""
    folder = write_checkpoint(tmp_path_factory.mktemp("native"), tokenizer=True)
    with live(Model.load(folder, threads=1), max_batch=8) as server:
        yield server


async def ask_all(url: str, prompts: list[str]) -> list[str]:
    """All at once: chats and completions, streamed and whole, some of which leave early."""
    async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as api:

        async def completion(prompt: str, stream: bool) -> str:
            asked: Any = {"model": "test", "prompt": prompt, "max_tokens": 60, "temperature": 0}
            if not stream:
                return str((await api.completions.create(**asked)).choices[0].text)
            return "".join([c.choices[0].text async for c in await api.completions.create(**asked, stream=True)])

        async def chat(prompt: str, stream: bool) -> str:
            messages: Any = [{"role": "user", "content": prompt}]
            asked: Any = {"model": "test", "messages": messages, "max_tokens": 60, "temperature": 0}
            if not stream:
                return (await api.chat.completions.create(**asked)).choices[0].message.content or ""
            chunks = [c async for c in await api.chat.completions.create(**asked, stream=True)]
            return "".join(c.choices[0].delta.content or "" for c in chunks)

        async def leave(prompt: str) -> None:
            stream = await api.completions.create(model="test", prompt=prompt, max_tokens=120, stream=True)
            async for _ in stream:
                break
            await stream.close()

        jobs = [(chat if i % 2 else completion)(prompt, i % 4 < 2) for i, prompt in enumerate(prompts)]
        gone = [leave(prompt) for prompt in prompts[::4]]
        return list((await asyncio.gather(*jobs, *gone))[: len(prompts)])


def test_sixteen_together_answer_as_each_alone(hashing: Live) -> None:
    sixteen_together(hashing)


def test_sixteen_together_on_the_compiled_engine(native: Live) -> None:
    sixteen_together(native)


def sixteen_together(server: Live) -> None:
    prompts = [f"prompt {i} " * (1 + 3 * (i % 5)) for i in range(16)]
    alone = solo(server, prompts)
    assert asyncio.run(ask_all(server.url, prompts)) == alone
    server.wait(lambda s: (s["running"], s["waiting"], s["pages_used"]) == (0, 0, 0))


def test_the_server_says_what_the_generator_says(native: Live) -> None:
    """Text, tokens, probabilities and usage of the compiled engine, through the API and in Python."""
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5, logprobs=4)
    said = native.generator.submit("Once upon a time", params=params).result()
    api = client(native)
    asked: Any = {"model": "test", "prompt": "Once upon a time", "max_tokens": 30, "temperature": 0.8, "seed": 5}
    answer = api.completions.create(**asked, logprobs=4)
    assert answer.choices[0].text == said.text and answer.choices[0].finish_reason == said.finish_reason
    assert answer.usage is not None and said.logprobs is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (said.prompt_tokens, len(said.token_ids))
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs == [entry.logprob for entry in said.logprobs]
    streamed = list(api.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == said.text

    said = native.generator.submit(messages=HI, params=SamplingParams(max_tokens=30, temperature=0)).result()
    chat = api.chat.completions.create(model="test", messages=HI, max_tokens=30, temperature=0)
    assert chat.choices[0].message.content == said.text
    assert chat.usage is not None and chat.usage.prompt_tokens == said.prompt_tokens


def solo(server: Live, prompts: list[str]) -> list[str]:
    """Each prompt by itself, without streaming; chat for every second one, as ask_all does."""
    api, found = client(server), []
    for i, prompt in enumerate(prompts):
        settings: Any = {"model": "test", "max_tokens": 60, "temperature": 0}
        if i % 2:
            messages: Any = [{"role": "user", "content": prompt}]
            found.append(api.chat.completions.create(messages=messages, **settings).choices[0].message.content or "")
        else:
            found.append(api.completions.create(prompt=prompt, **settings).choices[0].text)
    return found
