#!/usr/bin/env bash
# Style and types of the whole tree: ruff, clang-format, mypy. Run ./scripts/test.sh once before: it installs them.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin

echo "ruff" >&2
"$bin/ruff" check --quiet .
"$bin/ruff" format --quiet --check . || { echo "ruff would reformat these: .venv/bin/ruff format ." >&2; exit 1; }

echo "clang-format" >&2
find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' |
  xargs "$bin/clang-format" --dry-run -Werror

echo "mypy" >&2
# mypy knows nothing of package_dir: it sees the packages under their import names through links.
tree=build/typing
rm -rf "$tree"
mkdir -p "$tree/halfturn"
ln -s "$PWD"/engine/*.py "$tree/halfturn/"
find engine -name '*.pyi' -exec ln -s "$PWD/{}" "$tree/halfturn/" \;
ln -s "$PWD/converter" "$tree/halfturn/converter"
ln -s "$PWD/server" "$tree/halfturn/server"
(cd "$tree" && "$bin/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p halfturn)
