"""Perplexity: the convention by known answers, and the messages of what can't be evaluated."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from halfturn.error import Error
from halfturn.evaluate import perplexity, read_text, windows
from halfturn.model import Lease

np = pytest.importorskip("numpy")


class Letters:
    """One token a character; what is asked for is remembered."""

    def __init__(self) -> None:
        self.calls: list[bool] = []

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        self.calls.append(add_special_tokens)
        return [ord(c) - ord("a") for c in text]


class Native:
    """Gives token t, at any place, the negative log probability `losses[t]`."""

    page_size, context, pages = 4, 64, 16

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = losses
        self.items: list[Any] = []

    def nll(self, items: list[Any]) -> Any:
        self.items += items
        return np.array([self.losses[t] for item in items for t in item.tokens[1:]], dtype=np.float32)


def model(losses: dict[int, float], context: int = 64) -> Any:
    backend = SimpleNamespace(Item=lambda tokens, position, pages, sampler: SimpleNamespace(**locals()))
    native = Native(losses)
    return SimpleNamespace(native=native, backend=backend, tokenizer=Letters(), context=context, lease=Lease())


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    letters = Letters()
    assert windows(letters, "abcdefgh", 3) == [[0, 1, 2], [3, 4, 5]]
    assert windows(letters, "abcdefgh", 3, 1) == [[0, 1, 2]]
    assert windows(letters, "abcdefgh", 8, 9) == [list(range(8))]
    assert letters.calls == [False] * 3  # one call a text, no BOS


@pytest.mark.parametrize(
    ("context", "count", "message"),
    [
        (9, None, "8 tokens, one window takes 9"),
        (1, None, "--context must be at least 2"),
        (4, 0, "--windows must be at least 1"),
    ],
)
def test_windows_refuses(context: int, count: int | None, message: str) -> None:
    with pytest.raises(Error, match=message):
        windows(Letters(), "abcdefgh", context, count)


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    result = perplexity(model(dict.fromkeys(range(26), math.log(26))), "abcdefghijklmnopqrstuvwxyz", context=5)
    assert result == {"perplexity": pytest.approx(26), "tokens": 20, "windows": 5, "context": 5}


def test_the_first_token_of_a_window_is_not_predicted() -> None:
    # Windows "ab" and "ab": only b counts, so the loss of a must not show.
    result = perplexity(model({0: 100.0, 1: math.log(3)}), "ababa", context=2)
    assert result == {"perplexity": pytest.approx(3), "tokens": 2, "windows": 2, "context": 2}


def test_mean_is_over_tokens() -> None:
    told: list[tuple[int, int, float]] = []
    losses = {0: 9.0, 1: 0.5, 2: 1.5}
    result = perplexity(model(losses), "abcabb", 3, progress=lambda *values: told.append(values))
    assert result["perplexity"] == pytest.approx(math.exp((0.5 + 1.5 + 0.5 + 0.5) / 4))
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
    assert told[0][2] == pytest.approx(math.exp(1.0)) and told[1][2] == pytest.approx(result["perplexity"])


def test_each_window_starts_at_position_0_on_pages_of_its_length() -> None:
    fake = model(dict.fromkeys(range(26), 1.0))
    perplexity(fake, "abcdefghijkl", context=6)
    assert [(item.tokens, item.position, item.pages) for item in fake.native.items] == [
        ([0, 1, 2, 3, 4, 5], 0, [0, 1]),
        ([6, 7, 8, 9, 10, 11], 0, [0, 1]),
    ]


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(Error, match="windows of 6 tokens don't fit a context of 4"):
        perplexity(model({}, context=4), "abcdefghijkl", context=6)


def test_a_model_with_a_generator_is_refused() -> None:
    """It would write over the pages of running requests, and over those whose prefixes later ones share."""
    shared = model({0: 1.0, 1: 1.0})
    with shared.lease, pytest.raises(Error, match="close it first, or load the model once more"):
        perplexity(shared, "abab", context=2)
    assert perplexity(shared, "abab", context=2)["tokens"] == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(Error, match="the checkpoint is damaged"):
        perplexity(model({0: loss, 1: loss}), "abab", context=2)


def test_read_text_keeps_every_byte(tmp_path: Any) -> None:
    file = tmp_path / "text"
    file.write_bytes(b" one\r\ntwo\n\n\xc3\xa9")
    assert read_text(file) == " one\r\ntwo\n\né"


def test_wikitext_join_is_the_join_of_the_rows(tmp_path: Any) -> None:
    rows = ["", " = Title = \n", "", " First . \n", " Second . \n", ""]  # as the dataset's column "text" holds them
    file = tmp_path / "wiki.test.raw"
    file.write_bytes(b"".join((row or " \n").encode() for row in rows))  # as the raw file holds them
    assert read_text(file, wikitext_join=True) == "\n\n".join(rows)


def test_bad_files_are_named(tmp_path: Any) -> None:
    file = tmp_path / "bad"
    file.write_bytes(b"ab\xff")
    with pytest.raises(Error, match=r"bad is not UTF-8 text: byte 2 can't be decoded"):
        read_text(file)
    with pytest.raises(Error, match=r"gone can't be read: No such file"):
        read_text(tmp_path / "gone")
