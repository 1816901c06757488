# Defines use_environment [EXTRA,EXTRA]: makes .venv with the project and at least these extras unless it exists, and
# puts it on the PATH. Call it in the repository's root.

# Prints the real interpreter behind $1 (also behind a venv) if it can make our environment. A command may exist and
# still fail, as pyenv's shims do.
usable_python() {
  "$1" -c '
import ensurepip, os, sys, venv
if sys.version_info < (3, 11):
    sys.exit(1)
print(os.path.realpath(sys._base_executable))' 2>/dev/null
}

find_python() {
  local python
  if [ -n "${PYTHON:-}" ]; then
    usable_python "$PYTHON" && return
    echo "error: PYTHON=$PYTHON is not a Python 3.11 or newer with ensurepip and venv" >&2
    return 1
  fi
  # An existing environment keeps its Python, whatever is on the PATH.
  for python in .venv/bin/python python3.12 python3.11 python3.13 python3; do
    usable_python "$python" && return
  done
  echo "error: found no Python 3.11 or newer with ensurepip and venv; set PYTHON to one" >&2
  return 1
}

# Prints the sorted union of two lists of extras.
union() {
  printf '%s\n' "$1" "$2" | tr , '\n' | sed '/^$/d' | sort -u | paste -s -d , -
}

use_environment() {
  local python identity installed wanted stamp=.venv/switchjax-installed
  python=$(find_python) || return 1
  identity=$(cksum setup.cfg constraints.txt && pwd && echo "$python" && "$python" --version) || return 1
  # The stamp holds the identity and, on its last line, the extras. It is missing while anything changes, so that an
  # interrupted installation is repeated.
  if [ "$(sed '$d' "$stamp" 2>/dev/null)" != "$identity" ]; then
    echo "Making .venv with $("$python" --version) ..." >&2
    rm -f "$stamp"
    "$python" -m venv --clear .venv || return 1
  fi
  installed=$(sed '$!d' "$stamp" 2>/dev/null || true)
  wanted=$(union "$installed" "${1:-}")
  if [ ! -e "$stamp" ] || [ "$wanted" != "$installed" ]; then
    rm -f "$stamp"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
      --editable ".${wanted:+[$wanted]}" || return 1
    printf '%s\n' "$identity" "$wanted" >"$stamp"
  fi
  PATH=$PWD/.venv/bin:$PATH
}
