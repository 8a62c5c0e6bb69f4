# Sourced by the other scripts: virtual environments that are made once and brought up to date when something changed.

# make_environment FOLDER EXTRAS: halfturn[EXTRAS], editable, with the compiled engine built in place.
# PYTHON chooses the interpreter of a new environment (python3).
make_environment() {
  local folder=$1 extras=$2 python=$1/bin/python stamp=$1/halfturn.stamp state
  # The CUDA backend takes minutes to compile: it is built only where a card is found, unless HALFTURN_CUDA says.
  if [[ -z ${HALFTURN_CUDA:-} ]] && ! nvidia-smi -L > /dev/null 2>&1; then export HALFTURN_CUDA=0; fi
  [[ -x $python ]] || "${PYTHON:-python3}" -m venv "$folder"
  state=$("$python" --version; cat pyproject.toml constraints.txt)
  # A stamp lists what was installed before, so that an environment made for more also serves for less.
  if [[ ! -f $stamp || $(head -n -1 "$stamp") != "$state" || $(tail -n 1 "$stamp") != *"$extras"* ]]; then
    echo "installing into $folder ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel "pybind11>=2.12" ninja
    # Without isolation the objects of one build serve the next: the path of pybind11 stays the same.
    "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[$extras]"
    printf '%s\n%s\n' "$state" "$extras" > "$stamp"
  fi
  "$python" setup.py --quiet build_ext --inplace
}
