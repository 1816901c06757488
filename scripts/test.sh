#!/usr/bin/env bash
# Sets up the environment and runs all checks: format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  echo 'usage: scripts/test.sh [PYTEST ARGUMENT ...]   e.g. scripts/test.sh -m "not slow"'
  exit 0
fi
cd "$(dirname "$0")/.."
. scripts/use_environment.sh
use_environment dev,lm-eval,notebooks,plan

ruff format --check .
ruff check .
mypy
python -m pytest -n 2 --dist loadfile "$@"
