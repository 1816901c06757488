# Sourced by the other scripts: makes .venv with the project and the given extras, once, and puts it on the PATH.
# Usage: . scripts/environment.sh [EXTRA,EXTRA]
find_python() {
  for python in ${PYTHON:-} python3.12 python3.11 python3.13 python3; do
    if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; set PYTHON to one" >&2
  return 1
}

make_environment() {
  local extras=$1 python wanted
  wanted=$(cat setup.cfg constraints.txt | cksum)" $extras"
  if [ "$(cat .venv/switchjax-installed 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python) || return 1
    echo "Making .venv with $("$python" --version) ..." >&2
    "$python" -m venv --clear .venv || return 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
      --editable ".${extras:+[$extras]}" || return 1
    echo "$wanted" >.venv/switchjax-installed
  fi
  PATH=$PWD/.venv/bin:$PATH
}

make_environment "${1:-}"
