"""The exceptions of Halfturn: each message is a sentence for the user."""

from __future__ import annotations


class Error(Exception):
    """Bad input or a state that can't go on; the message says what happened, the number that matters and what to do."""


class ContextError(Error):
    """A request that is longer than the context: by its prompt alone, or only with the new tokens that it asks for."""

    def __init__(self, message: str, prompt_fits: bool = False) -> None:
        super().__init__(message)
        self.prompt_fits = prompt_fits


def quoted(value: object, length: int = 80) -> str:
    """repr(value) as far as the user needs it to recognise the value."""
    if isinstance(value, int) and value.bit_length() > 300:  # Python refuses to spell very long ones
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)) and len(value) > length:
        text = repr(value[: length - 5]) + "..."
    else:
        text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
