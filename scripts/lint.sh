#!/usr/bin/env bash
# Style and types of the whole tree: ruff, clang-format, mypy. ./scripts/test.sh installs them into .venv.
# `./scripts/lint.sh --fix` rewrites what can be rewritten.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
failed=0

mapfile -t native < <(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
if [[ ${1:-} == --fix ]]; then
  "$bin/ruff" check --quiet --fix . || true
  "$bin/ruff" format --quiet .
  "$bin/clang-format" -i "${native[@]}"
fi

mkdir -p build
"$bin/ruff" check --quiet . || failed=1
"$bin/ruff" format --quiet --check . || { echo "ruff format: ./scripts/lint.sh --fix" >&2; failed=1; }
"$bin/clang-format" --dry-run -Werror "${native[@]}" 2> build/clang-format.log ||
  { grep -oE '^[A-Za-z][^ :]*' build/clang-format.log | grep / | sort -u >&2; echo "clang-format: ./scripts/lint.sh --fix" >&2; failed=1; }

# mypy knows nothing of package_dir: it sees the packages under their import names, through links.
tree=build/typing
rm -rf "$tree"
mkdir -p "$tree/halfturn"
ln -s "$PWD"/engine/*.py "$tree/halfturn/"
ln -s "$PWD/converter" "$tree/halfturn/converter"
ln -s "$PWD/server" "$tree/halfturn/server"
(cd "$tree" && "$bin/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p halfturn) || failed=1
exit "$failed"
