"""`python -m halfturn` is `halfturn`."""

from halfturn.cli import main

if __name__ == "__main__":
    main()
