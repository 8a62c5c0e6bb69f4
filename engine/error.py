"""The one exception of Halfturn: its message is a sentence for the user."""


class Error(Exception):
    """Bad input or a state that can't go on; the message says what happened, the number that matters and what to do."""


class ContextError(Error):
    """A request that is longer than the context."""
