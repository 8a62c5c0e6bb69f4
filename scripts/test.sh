#!/usr/bin/env bash
# Everything that a change must pass: style, types, tests. Arguments go to pytest: ./scripts/test.sh -k tokenizer -x
# Makes or reuses .venv; PYTHON chooses the interpreter of a new one.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv convert,test
./scripts/lint.sh
.venv/bin/python scripts/get_model.py > /dev/null ||
  echo "NOTICE: SmolLM2 could not be fetched; the tests of a real model are skipped" >&2
.venv/bin/python -m pytest "$@"
