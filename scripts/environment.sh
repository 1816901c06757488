# For a shell of yours: . scripts/environment.sh [EXTRA,EXTRA]
# Scripts call use_environment themselves: sourced without arguments, this file would take theirs for extras.
. scripts/use_environment.sh
use_environment "${1:-}"
