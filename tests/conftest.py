"""What all tests need of their process, and what several files start from."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from halfturn import Generator

# A shell starts its background jobs with SIGINT ignored, and so would be Python and every program that a test starts:
# tests that press Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=[0, 64], ids=["whole steps", "steps in halves"])
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Generator]]:
    """Makes generators over a fake model, and closes them."""
    import fake_native
    from halfturn import Generator

    made: list[Generator] = []

    def make(reply: str | bytes | None = None, max_batch: int = 32, **settings: Any) -> Generator:
        model = fake_native.load(tmp_path / "model", reply, overlap_rows=request.param, **settings)
        made.append(Generator(model, max_batch=max_batch))
        return made[-1]

    yield make
    for generator in made:
        generator.close()
