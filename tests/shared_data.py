"""Real tokenizers, texts, configurations and a small model, in a folder beside the repository that may be missing."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
TOKENIZERS = SHARED / "tokenizers"
STORIES = SHARED / "stories260K"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="published tokenizers, texts and configurations, in ../shared/data, are missing"
)
needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason="the model stories260K, in ../shared/data/stories260K, is missing"
)
