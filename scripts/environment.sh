# Sets up the environment in your shell: . scripts/environment.sh [EXTRA,EXTRA]
# Scripts call use_environment directly, because this file would read their arguments as extras.
. scripts/use_environment.sh
use_environment "${1:-}"
