"""What ends a text: stop strings and stop tokens, over the fake native engine; and how min_tokens puts them off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fake_native import BYTE_IDS
from halfturn import Generator, SamplingParams

Start = Callable[..., Generator]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("wor", "Hello, ", "wor"),
        ("lo, w", "Hel", "lo, w"),
        (["xyz", "ld"], "Hello, wor", "ld"),
        (["world", "o, wor"], "Hell", "o, wor"),  # the one that begins first
        ("!", "Hello, world", "!"),
        ("nothing", "Hello, world! Hello", 258),
        ("Hello, worms", "Hello, world! Hello", 258),  # begins twice and never comes
        ("H", "", "H"),
    ],
)
def test_stop_strings(start: Start, stop: Any, text: str, reason: str | int) -> None:
    job = start("Hello, world! Hello").submit("a", params=SamplingParams(temperature=0, stop=stop))
    shown = ""
    for piece in job:
        shown += piece.text
        assert text.startswith(shown), "text of a stop string, or beyond it, was shown"
    output = job.result()
    assert output.text == shown == text and output.finish_reason == "stop"
    assert output.stop_reason == reason


def test_stop_string_inside_one_token(start: Start) -> None:
    """Tokens of several characters: what precedes the stop in its token is shown."""
    generator = start(script=lambda tokens, drawn: 65)
    spelled = {65: b"abSTOPcd"}
    generator.model.tokenizer._codec._bytes.update(spelled)
    output = generator.generate(["x"], SamplingParams(temperature=0, stop="STOP", max_tokens=5))[0]
    assert (output.text, output.stop_reason, len(output.token_ids)) == ("ab", "STOP", 1)


def test_stop_characters_of_several_bytes(start: Start) -> None:
    output = start("naïve 🦄🦊!").generate(["x"], SamplingParams(temperature=0, stop="🦊"))[0]
    assert output.text == "naïve 🦄"


def test_held_text_comes_out_at_the_end(start: Start) -> None:
    generator = start("Hello")
    for count, text in [(4, "Hell"), (None, "Hello")]:
        output = generator.generate(["x"], SamplingParams(temperature=0, stop="llox", max_tokens=count))[0]
        assert output.text == text


def test_stop_token_ids(start: Start) -> None:
    output = start("Hello").generate(["x"], SamplingParams(temperature=0, stop_token_ids=[BYTE_IDS[ord("l")]]))[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("He", "stop", BYTE_IDS[ord("l")])


def test_min_tokens_delays_every_end(start: Start) -> None:
    generator = start("ab")
    output = generator.generate(["x"], SamplingParams(temperature=0, min_tokens=5))[0]
    assert output.token_ids[5:] == [258] and 258 not in output.token_ids[:5] and output.finish_reason == "stop"
    output = generator.generate(["x"], SamplingParams(temperature=0, min_tokens=5, stop="b"))[0]
    assert output.text.startswith("ab") and len(output.token_ids) == 6
    for count, text in [(1, "a"), (2, "ab")]:  # "b" is the second token
        output = generator.generate(["x"], SamplingParams(temperature=0, min_tokens=count, stop="b"))[0]
        assert output.text == text
    output = generator.generate(["x"], SamplingParams(temperature=0, min_tokens=2, max_tokens=6, ignore_eos=True))[0]
    assert output.finish_reason == "length" and len(output.token_ids) == 6 and 258 not in output.token_ids


def test_min_tokens_within_a_stop_string(start: Start) -> None:
    """One that began before min_tokens and is complete after them ends the text; none of it is shown."""
    for count in range(9):  # the stop string is the tokens 5 to 8
        job = start("abcdSTOPefgh").submit([1], params=SamplingParams(temperature=0, stop="STOP", min_tokens=count))
        shown = [piece.text for piece in job]
        assert "".join(shown) == job.result().text == ("abcd" if count < 8 else "abcdSTOPefgh")


@pytest.mark.parametrize(
    ("reply", "stops", "count", "text"),
    [
        ("abxyz", ("ab", "abc"), 2, "abxyz"),  # what is held for the longer one ends nothing
        ("abcz", ("ab", "abcd"), 2, "abcz"),
        ("abcz", ("b", "bcd"), 2, "abcz"),
        ("abcd", ("ab", "abcd"), 2, ""),
        ("xabab", ("ab",), 3, "xab"),
    ],
)
def test_stop_strings_that_were_complete_before_min_tokens(
    start: Start, reply: str, stops: tuple[str, ...], count: int, text: str
) -> None:
    params = SamplingParams(temperature=0, stop=stops, min_tokens=count)
    assert start(reply).generate(["x"], params)[0].text == text


def test_no_stop_string_is_no_stop(start: Start) -> None:
    assert start("Hello").generate(["x"], SamplingParams(temperature=0, stop=""))[0].text == "Hello"
