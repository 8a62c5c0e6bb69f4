#!/usr/bin/env bash
# Everything that needs a CUDA card: builds for it, runs the GPU tests, compute-sanitizer on small cases, a server whose
# requests run short of pages, and the kernel and model benchmarks, and prints a short table last.
#   scripts/gpu_check.sh [tests] [sanitizer] [server] [kernels] [models]        without arguments: all five
# Uses the python3 that PYTHON names, with numpy, pybind11, ninja, setuptools, pytest and halfturn's dependencies.
# Logs go to OUT, by default build/gpu_check.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu_check}
mkdir -p "$out"
steps=${*:-tests sanitizer server kernels models}
summary=$out/summary.txt
: > "$summary"

HALFTURN_CUDA=1 "$python" setup.py --quiet build_ext --inplace 2>&1 | tee "$out/build.log" | tail -20
"$python" -c 'import halfturn' 2> /dev/null ||
  "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . 2>&1 | tail -3

"$python" scripts/check_cuda_code.py engine/_C.*.so >> "$summary"

gpu_tests=(tests/test_cuda.py tests/test_attention.py tests/test_gemm_cuda.py tests/test_sampler_cuda.py)

if [[ $steps == *tests* ]]; then
  status=0
  "$python" -m pytest --maxfail=12 -p no:cacheprovider -k "cuda or card" "${gpu_tests[@]}" > "$out/tests.log" 2>&1 ||
    status=$?
  tail -1 "$out/tests.log" | sed 's/^/tests: /' >> "$summary"
  grep -E "^(FAILED|ERROR)" "$out/tests.log" | cut -c1-300 >> "$summary" || true
fi
if [[ $steps == *sanitizer* ]]; then
  for tool in memcheck racecheck; do
    timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all "$python" \
      scripts/gpu_sanitize.py > "$out/$tool.log" 2>&1 && verdict=clean || verdict="FAILED ($?)"
    echo "compute-sanitizer $tool: $verdict; $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -1)" >> "$summary"
  done
fi
if [[ $steps == *server* ]]; then
  model=$(mktemp -d)
  for kind in "smollm2-135m 4" "llama-3.1-8b 3 4 5"; do
    read -r shape bits <<< "$kind"
    # shellcheck disable=SC2086 # one word for each width
    {
      "$python" scripts/make_synthetic.py "$model/$shape" --shape "$shape" --bits $bits &&
        "$python" scripts/soak_server.py "$model/$shape" --seconds 40 --context 8192 --kv-tokens 8192 --kv-bits 4
    } > "$out/server-$shape.log" 2>&1 && verdict=passed || verdict="FAILED ($?)"
    echo "server, $kind bits: $verdict; $(tail -2 "$out/server-$shape.log" | paste -sd ';')" >> "$summary"
    rm -rf "${model:?}/$shape"
  done
  rm -rf "$model"
fi
if [[ $steps == *kernels* ]]; then
  "$python" scripts/bench_kernels.py --rows 1 8 16 32 128 2048 > "$out/kernels.log" 2>&1 || echo "bench_kernels.py FAILED" >> "$summary"
  cat "$out/kernels.log" >> "$summary"
fi
if [[ $steps == *models* ]]; then
  "$python" scripts/bench_cuda.py --repeat 3 > "$out/models.log" 2>&1 || echo "bench_cuda.py FAILED" >> "$summary"
  cat "$out/models.log" >> "$summary"
fi
echo "=== summary"
cat "$summary"
[[ ${status:-0} == 0 ]]
