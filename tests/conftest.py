"""What all tests need of their process."""

import signal

# A shell starts its background jobs with SIGINT ignored, and so would be Python and every program that a test starts:
# tests that press Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
