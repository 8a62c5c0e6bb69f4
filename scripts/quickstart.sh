#!/usr/bin/env bash
# From a fresh clone to a chat: makes .venv, gets SmolLM2-135M-Instruct, converts it to 4 bits a weight and talks to it.
# Takes a few minutes the first time, seconds after that. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

model=models/smollm2-4.0bpw
prompt="In three sentences: why is the sky blue?"
halfturn=.venv/bin/halfturn

make_environment .venv convert
source_model=$(.venv/bin/python scripts/get_model.py)
if [[ ! -f $model/config.json ]]; then
  echo "converting SmolLM2-135M to 4.0 bits per weight" >&2
  "$halfturn" convert "$source_model" "$model" --bpw 4.0
fi

printf '\n> %s\n' "$prompt"
"$halfturn" generate "$model" --chat --prompt "$prompt" --max-tokens 160 --temperature 0.3 --seed 1

printf '\nSpeed and quality of %s\n' "$model"
"$halfturn" bench "$model" --prompt-tokens 256 --new-tokens 64 --batch 1,4 --repeat 3
.venv/bin/python - "$model/config.json" <<'PYTHON'
import json, sys
quantization = json.load(open(sys.argv[1]))["quantization_config"]
for name, value in quantization["measured"].items():
    print(f"{name.replace('_', ' '):<22} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' '):<22} {value}")
PYTHON

cat <<TEXT

Talk to it:      $halfturn chat $model
Serve it:        $halfturn serve $model
Other models:    $halfturn convert SOURCE OUT --bpw 4.0     (a folder, a hub id or a GGUF file)
TEXT
