"""The server's own promises: what it refuses, and by which field; what it lets in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

import fake_native
from checkpoints import write_checkpoint
from halfturn import Model
from halfturn.job import TokenLogprob
from halfturn.server.answers import CompletionAnswer
from halfturn.server.schema import ChatRequest, CompletionRequest
from live_server import CHAT, HI, TEXT, Live, chat, events, live, text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(fake_native.load(tmp_path_factory.mktemp("model"), reply="Hello, world. Bye.")) as found:
        yield found


BAD_FIELDS = [
    ("temperature", 2.5, "at most 2"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", "hot", "a number"),
    ("temperature", True, "a number"),
    ("top_p", 1.5, "at most 1"),
    ("top_k", -2, "at least -1"),
    ("top_k", 1.5, "an integer"),
    ("min_p", 2, "at most 1"),
    ("repetition_penalty", 0, "more than 0"),
    ("presence_penalty", 3, "at most 2"),
    ("frequency_penalty", -3, "at least -2"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", "ten", "an integer"),
    ("min_tokens", -1, "at least 0"),
    ("n", 0, "at least 1"),
    ("n", 1000, "at most 128"),
    ("seed", 1.5, "an integer"),
    ("seed", "x", "an integer"),
    ("stream", "yes", "true or false"),
    ("stop", 5, "a string or a list of strings"),
    ("stop", [""], "not empty"),
    ("stop", ["x"] * 17, "up to 16"),
    ("stop_token_ids", "2", "an array"),
    ("logit_bias", [1], "an object"),
    ("logit_bias", {"x": 1}, "'x' is not a token id"),
    ("model", 5, "a string"),
    ("stream_options", {"include_usage": True}, "when stream is true"),
    ("temprature", 1, "unrecognized request argument: temprature"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD_FIELDS)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bad_field(server: Live, path: str, field: str, value: Any, says: str) -> None:
    body = chat(**{field: value}) if path == CHAT else text(**{field: value})
    status, param, message = server.error(path, body)
    assert (status, param) == (400, field)
    assert says in message


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": None}, "messages", "an array"),
        ({"messages": ["hi"]}, "messages[0]", "an object"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [*HI, {"role": "user", "content": 5}]}, "messages[1].content", "of type int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "text parts only",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"tools": [{"type": "search"}]}, "tools[0]", "function"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "exclude each other",
        ),
        ({"chat_template_kwargs": {"a": 1, "check": 2}}, "chat_template_kwargs.check", "leave it out"),
        ({"messages": [*HI, {"role": "assistant", "refusal": None}]}, "messages[1].content", "missing"),
        ({"messages": [*HI, {"role": "assistant", "refusal": 5}]}, "messages[1].refusal", "a string"),
        (
            {"messages": [*HI, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
            "messages[1].function_call",
            "use tool_calls",
        ),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template", "can't be set"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}]},
            "messages[0].content[0].type",
            "text parts only",
        ),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"logprobs": 2}, "logprobs", "true or false"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "300"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "300"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "3"),
    ],
)
def test_bad_chat(server: Live, fields: dict[str, Any], param: str, says: str) -> None:
    status, named, message = server.error(CHAT, chat(**fields))
    assert (status, named) == (400, param)
    assert says in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_bad_completion(server: Live, fields: dict[str, Any], param: str) -> None:
    assert server.error(TEXT, text(**fields))[:2] == (400, param)


def test_missing_fields_are_named(server: Live) -> None:
    assert server.error(CHAT, {"model": "test"}) == (400, "messages", "messages is missing")
    assert server.error(TEXT, {"model": "test"}) == (400, "prompt", "prompt is missing")


def test_too_long_for_the_context_says_both_numbers(server: Live) -> None:
    for path, body, param in ((CHAT, chat(), "messages"), (TEXT, text(), "prompt")):
        long = "x" * 300
        body |= {"messages": [{"role": "user", "content": long}]} if path == CHAT else {"prompt": long}
        response = server.post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
        assert "256" in error["message"] and ("300" in error["message"] or path == CHAT)
    for path, body, param in (
        (CHAT, chat(max_tokens=None, min_tokens=300), "min_tokens"),
        (TEXT, text(max_tokens=300), "max_tokens"),
        (CHAT, chat(max_tokens=300), "max_tokens"),
        (CHAT, chat(max_completion_tokens=300), "max_completion_tokens"),
    ):
        status, named, message = server.error(path, body)
        assert (status, named) == (400, param)
        assert "tokens and 300 new ones" in message and f"lower {param}" in message


def test_text_that_cannot_fit_is_not_tokenized(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token stands for up to 12 characters here, <|im_start|>."""
    tokenizer = server.generator.model.tokenizer
    for name in ("encode", "encode_marked", "decode"):
        monkeypatch.setattr(tokenizer, name, lambda *_, **__: pytest.fail("it was tokenized"))
    long = "x" * (256 * 12 + 1)
    cases = [(TEXT, text(prompt=long), "prompt", "3073 characters, the context of 256 tokens holds at most 3072"),
             (TEXT, text(prompt=[5] * 256, echo=True, n=128), "prompt", "256 tokens"),
             (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": long}]}]), "messages", "3074"),
             (CHAT, chat(messages=[{"role": "user", "content": ""}] * 3073), "messages", "3073")]  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "description": long}}
    cases.append((CHAT, chat(tools=[tool]), "messages", "characters"))
    for path, body, param, says in cases:
        status, named, message = server.error(path, body)
        assert (status, named) == (400, param)
        assert says in message


CALLS = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}]}


def test_a_template_s_refusal_is_about_the_messages(tmp_path: Path) -> None:
    model = fake_native.load(tmp_path, reply="ok")
    with live(model) as server:
        for template, body, param in (
            ("{{ raise_exception('the model must stop: seed and tools') }}", chat(), "messages"),
            ("", chat(), "messages"),
            ("{{ messages[0].content }}", chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
            ("{{ messages[0].content }}", chat(messages=[*HI, CALLS]), "messages[1].tool_calls"),
        ):
            model.tokenizer.chat_template = template
            assert server.error(CHAT, body)[:2] == (400, param)


@pytest.mark.parametrize("arguments", ["[" * 700 + "]" * 700, "[" * 3000 + "]" * 3000, "[" * 100_000])
def test_tool_calls_with_deep_arguments(server: Live, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    response = server.post(CHAT, chat(messages=messages))
    assert response.status_code == 200 or response.json()["error"]["param"] == "messages"


def test_refusals_do_not_send_large_values_back(server: Live) -> None:
    large = "y" * 100_000
    for path, body in (
        (TEXT, text(model=large)),
        (TEXT, text(**{large: 1})),
        (TEXT, text(max_tokens=int("9" * 4000))),
        (TEXT, text(prompt=[int("9" * 4000)])),
        (CHAT, chat(messages=[{"role": large, "content": "x"}])),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": large}]}])),
    ):
        response = server.post(path, body)
        assert response.status_code in (400, 404) and len(response.content) < 600


def test_a_body_of_errors_is_refused_by_its_first(server: Live) -> None:
    """Each one made an entry of a report: 2 MB of them took 4 s, in which nobody else was served."""
    for fields, param in (
        ({"messages": [1] * 1000}, "messages[0]"),
        ({"stop_token_ids": ["a"] * 1000}, "stop_token_ids[0]"),
        ({"tools": [1] * 1000}, "tools[0]"),
    ):
        body = chat(**fields)
        assert server.error(CHAT, body)[:2] == (400, param)
        with pytest.raises(ValidationError) as refused:
            ChatRequest.model_validate_json(json.dumps(body))
        assert refused.value.error_count() == 1
    assert server.error(CHAT, chat(logit_bias=dict.fromkeys(map(str, range(1000)), "a")))[:2] == (400, "logit_bias")


def test_every_token_banned(server: Live) -> None:
    status, param, message = server.error(CHAT, chat(stop_token_ids=list(range(300)), min_tokens=2, max_tokens=2))
    assert (status, param) == (400, "stop_token_ids")
    assert "leave some out" in message


def test_bodies_that_are_no_request(server: Live) -> None:
    def send(content: bytes, kind: str = "application/json") -> tuple[int, str]:
        response = server.http.post(CHAT, content=content, headers={"content-type": kind})
        return response.status_code, response.json()["error"]["message"]

    assert send(b"{") == (400, "the request body is not valid JSON: EOF while parsing an object at line 1 column 1")
    assert send(b"")[0] == 400
    assert send(b"\xff\xfe")[0] == 400
    assert send(b"[" * 100_000)[0] == 400
    assert send(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')[0] == 400
    assert send(b"[]") == (400, "the request body must be a JSON object")
    assert send(b'{"messages": [], "temperature": NaN}')[0] == 400
    status, message = send(json.dumps(chat()).encode(), "text/plain")
    assert status == 415 and "application/json" in message
    good = {"content-type": "application/json; charset=utf-8"}
    assert server.http.post(CHAT, content=json.dumps(chat()).encode(), headers=good).status_code == 200


def test_unknown_routes_methods_and_models(server: Live) -> None:
    for path, status, code in (
        ("/v1/embeddings", 404, "unknown_url"),
        ("/", 404, "unknown_url"),
        (CHAT, 405, "method_not_allowed"),
        ("/v1/models/other", 404, "model_not_found"),
    ):
        response = server.http.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert server.http.get(CHAT).headers["allow"] == "POST"
    assert server.http.get("/v1/models/").json() == server.http.get("/v1/models").json()
    for path in ("/health", "/v1/models", "/v1/models/", "/v1/models/test"):
        head = server.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert server.error(CHAT, chat(model="gpt-5")) == (
        404,
        "model",
        "the model 'gpt-5' does not exist; this server has 'test'",
    )


def test_fields_for_openai_itself_are_accepted_and_null_is_absent(server: Live) -> None:
    harmless = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
    }
    nothing = {"tools": None, "response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto"}
    empty = {"temperature": None, "max_tokens": None, "stop": None, "n": None, "unheard_of": None, "functions": []}
    response = server.post(CHAT, chat(**harmless, **nothing, **empty))
    assert response.json()["choices"][0]["message"]["content"] == "Hello, world. Bye."


def test_what_asks_for_nothing_is_accepted(server: Live) -> None:
    refused = [{"role": "assistant", "content": None, "refusal": "No."}, {"role": "user", "content": "why"}]
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    plain = {"role": "assistant", "content": "No.", "refusal": None}
    nothing = {"reasoning_effort": "none", "logprobs": False, "top_logprobs": 0, "chat_template_kwargs": {}}

    def prompt_tokens(**fields: Any) -> int:
        response = server.post(CHAT, chat(**fields))
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["prompt_tokens"])

    same = prompt_tokens(messages=[*HI, plain, refused[1]])
    assert prompt_tokens(messages=[*HI, *refused], **nothing) == same
    assert prompt_tokens(messages=[*HI, {**refused[0], "content": ""}, refused[1]]) == same
    assert prompt_tokens(messages=[*HI, part, refused[1]]) == same


def test_of_several_tokens_of_one_name_the_likeliest_is_shown() -> None:
    names = {3: b"A", 4: b"A", 5: b"the"}
    answer = CompletionAnswer("model", "", SimpleNamespace(token_bytes=names.__getitem__))
    assert answer._top(TokenLogprob(5, -3.0, [(4, -0.1), (3, -5.0)])) == {"A": -0.1, "the": -3.0}
    assert answer._top(TokenLogprob(3, -5.0, [(4, -0.1)])) == {"A": -5.0}  # the drawn one has its own


def test_settings_of_the_template(tmp_path: Path) -> None:
    model = fake_native.load(tmp_path, reply="ok")
    model.tokenizer.chat_template = (
        "{{ messages[-1].content }}{{ word or '' }}<|im_end|>{% if add_generation_prompt %}!{% endif %}"
    )
    with live(model) as server:
        for fields, tokens in (
            ({}, len("hi") + 2),
            ({"chat_template_kwargs": {"word": "more"}}, len("himore") + 2),
            ({"add_generation_prompt": False}, len("hi") + 1),
            ({"continue_final_message": True}, len("hi")),
            ({"continue_final_message": True, "add_generation_prompt": False}, len("hi")),
        ):
            response = server.post(CHAT, chat(**fields))
            assert response.json()["usage"]["prompt_tokens"] == tokens, fields


def test_the_description_of_the_api_is_whole(server: Live) -> None:
    described = server.http.get("/openapi.json").json()
    body = described["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(body) and "role" in json.dumps(body["properties"]["messages"])
    operations = [operation for path in described["paths"].values() for operation in path.values()]
    statuses = {status for operation in operations for status in operation["responses"]}
    assert statuses == {"200", "4XX"}
    refusal = described["paths"][CHAT]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"]
    refused = server.http.get("/v1/models/other").json()
    assert list(refusal["properties"]) == list(refused) == ["error"]
    assert set(refusal["properties"]["error"]["properties"]) == set(refused["error"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The compiled engine, which takes fewer values than the one in Python."""
    folder = write_checkpoint(tmp_path_factory.mktemp("compiled"), layers=1, tokenizer=True)
    with live(Model.load(folder, threads=1, context=64)) as found:
        yield found


JUNK = [True, -1, 2**70, 1e400, -0.5, "", "x" * 300, "é", [], [[]], [None], {}, {"type": "x"}, {"a": {"b": []}}]
JUNK += [{"9" * 5000: 1}, {"²": 1}]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_no_value_of_any_field_breaks_the_server(compiled: Live, kind: type[Any]) -> None:
    """Junk in one field is accepted, or refused by that field's name; it is never an error of the server's own."""
    path, base = (CHAT, chat()) if kind is ChatRequest else (TEXT, text())
    for field in sorted({*kind.model_fields, *kind.neutral, "user"}):
        for value in JUNK:
            content = json.dumps(base | {field: value}).encode()
            response = compiled.http.post(path, content=content, headers={"content-type": "application/json"})
            if field == "stream" and value is True:
                assert events(response.text)
            elif response.status_code != 200:
                error = response.json()["error"]
                assert response.status_code in (400, 404), (field, value, error)
                elsewhere = error["code"] in ("invalid_json", "context_length_exceeded")
                assert elsewhere or error["param"].startswith(field), (field, value, error)


def test_a_body_over_the_limit(tmp_path: Path) -> None:
    with live(fake_native.load(tmp_path, reply="ok"), max_body_bytes=1000) as server:
        assert server.error(CHAT, chat(user="x" * 1000))[0] == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        response = server.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
        assert response.status_code == 413  # without a declared length
        assert server.post(CHAT, chat()).status_code == 200


def test_api_key_and_cors(tmp_path: Path) -> None:
    model = fake_native.load(tmp_path, reply="ok")
    with live(model, api_key="sésame", cors_origins=("https://page.example",)) as server:
        wrong = server.post(CHAT, chat(), headers={"Authorization": "Bearer other"})
        assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/v1/models").status_code == 401
        right = {"Authorization": "Bearer sésame".encode()}
        assert server.http.get("/v1/models", headers=right).status_code == 200
        other_case = {"Authorization": "bearer sésame".encode()}
        assert server.http.get("/v1/models", headers=other_case).status_code == 200
        for none in ("", "Bearer", "sésame".encode(), "Basic sésame".encode()):
            assert server.http.get("/v1/models", headers={"Authorization": none}).status_code == 401
        assert server.http.get("/health").status_code == 200
        asks = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = server.http.options(CHAT, headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        other = server.http.options(CHAT, headers=asks | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_without_cors_no_page_is_let_in(server: Live) -> None:
    response = server.post(CHAT, chat(), headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers
