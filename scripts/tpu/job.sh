#!/usr/bin/env bash
# A training run on a Cloud TPU slice, from the request for the machines to their return.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/tpu/job.sh COMMAND JOB [--dry-run]

  create   requests the slice, as a queued resource
  setup    brings every worker this repository's commit, its environment and the bucket
  launch   starts python scripts/train.py on every worker, for longer than the ssh lasts; what still runs is stopped first
  watch    does all that, again after each preemption, until the run is complete; then logs and delete
  logs     fetches every worker's log to runs/NAME/logs
  stop     SIGTERM: the run saves a checkpoint; launch resumes it
  delete   gives the slice back

JOB is a file of settings, such as scripts/tpu/example.job.
--dry-run prints the commands, quoted for a shell, and runs none.
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# The arguments in one line, as they would be typed.
quote() {
  local word line=''
  for word; do
    case $word in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Every command that reaches a cloud or writes a file goes through here.
run() {
  if [ -n "$dry_run" ]; then
    quote "$@"
  else
    echo "+ $(quote "$@")" >&2
    "$@"
  fi
}

note() { echo "# $*"; }

read_job() {
  local name
  SPOT=yes COMMIT=HEAD PREPARE='' ATTEMPTS=3 POLL=60
  unset NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET TRAIN
  [ -r "$1" ] || fail "cannot read the job $1"
  bash -n "$1" 2>/dev/null || fail "$1 is no bash: see scripts/tpu/example.job"
  # shellcheck source=scripts/tpu/example.job
  . "$1"
  for name in NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET TRAIN; do
    [ -n "${!name:-}" ] || fail "$1 does not set $name"
  done
  [[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME=$NAME: small letters, digits and - only, a letter first"
  [[ $BUCKET =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "BUCKET=$BUCKET: the name alone, without gs:// and folders"
  [[ $SPOT =~ ^(yes|no)$ ]] || fail "SPOT=$SPOT: yes or no"
  [[ $ATTEMPTS =~ ^[1-9][0-9]*$ ]] || fail "ATTEMPTS=$ATTEMPTS: a positive number"
  [[ $POLL =~ ^[1-9][0-9]*$ ]] || fail "POLL=$POLL: a positive number of seconds"
  for name in "${TRAIN[@]}"; do
    [[ $name != --workdir* ]] || fail "TRAIN must not set --workdir: it is $NAME in the bucket"
  done
  # By its hash from here on, so that a watch brings every slice the same.
  commit=$(git rev-parse --verify --quiet "$COMMIT^{commit}") || fail "COMMIT=$COMMIT: no commit of this repository"
}

slice() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

on_all_workers() { slice tpu-vm ssh "$NAME" --worker=all --command="$1"; }

create() {
  local spot=()
  [ "$SPOT" = no ] || spot=(--spot)
  slice queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
}

setup() {
  local archive=build/$NAME.tar.gz
  [ -z "$(git status --porcelain)" ] || note "uncommitted changes stay here: what is trained is $commit"
  run mkdir -p build
  run git archive --format=tar.gz --output="$archive" "$commit"
  slice tpu-vm scp "$archive" "$NAME:" --worker=all
  on_all_workers "$(worker_setup)"
}

# The images have Python 3.10, JAX wants 3.11. Without the caches of gcsfuse, what one worker writes the others see.
worker_setup() {
  cat <<END
set -eu
$PREPARE
mkdir -p $NAME bucket
find $NAME -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf $NAME.tar.gz -C $NAME
if ! mountpoint -q bucket; then
  command -v gcsfuse >/dev/null || { echo "error: no gcsfuse on \$(hostname): let PREPARE install it" >&2; exit 2; }
  sudo systemd-run --quiet --collect --unit=bucket --uid=\$(id -u) --property=After=network-online.target \\
    gcsfuse --foreground --metadata-cache-ttl-secs=0 $BUCKET \$HOME/bucket
  for second in \$(seq 60); do mountpoint -q bucket && break; sleep 1; done
  mountpoint -q bucket
fi
cd $NAME
PATH=\$HOME/.local/bin:\$PATH
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python3 -m pip install --quiet --user uv
  uv python install --quiet 3.12
fi
. scripts/environment.sh tpu
END
}

launch() { on_all_workers "$(worker_launch)"; }

# Bucket and run are units of systemd: at a preemption, the run ends (and saves) before the bucket goes. A unit has not
# the limits of a login, and TPUs want much memory locked.
worker_launch() {
  cat <<END
set -eu
cd $NAME
sudo systemctl stop $NAME 2>/dev/null || true
sudo systemd-run --quiet --collect --unit=$NAME --uid=\$(id -u) --working-directory=\$PWD \\
  --property=After=bucket.service --property=KillMode=mixed --property=TimeoutStopSec=300 \\
  --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \\
  --property=StandardOutput=append:\$HOME/$NAME.log --property=StandardError=append:\$HOME/$NAME.log \\
  \$PWD/.venv/bin/python scripts/train.py --workdir=\$HOME/bucket/$NAME $(quote "${TRAIN[@]}")
END
}

stop() { on_all_workers "sudo systemctl stop $NAME"; }

logs() {
  on_all_workers "mkdir -p bucket/$NAME/logs && cp $NAME.log bucket/$NAME/logs/\$(hostname).log"
  run mkdir -p "runs/$NAME"
  run gcloud storage cp "gs://$BUCKET/$NAME/logs" "runs/$NAME" --recursive --project="$PROJECT"
}

delete() { slice queued-resources delete "$NAME" --force --quiet; }

# Fails for "no" as for "cannot tell": nothing but a complete run ends a watch well.
is_complete() { run gcloud storage ls "gs://$BUCKET/$NAME/summary.json" --project="$PROJECT"; }

# A line from every worker: active, inactive, failed. Fails only if they cannot be asked.
activity() { on_all_workers "systemctl is-active $NAME || true"; }

# Prints nothing if there is no slice of that name.
state() { slice queued-resources list --filter="name~/$NAME\$" --format='value(state.state)'; }

watch() {
  local launched=0 now
  until is_complete >/dev/null 2>&1; do
    now=$(state) || now=UNKNOWN # the network; the next look will tell
    note "$(date '+%F %T') ${now:-no slice}"
    case $now in
    '') create ;;
    SUSPENDED) delete && launched=0 ;; # preempted: the next look creates it anew
    FAILED) fail "the request for $NAME has failed: look at it in the console, then delete it" ;;
    ACTIVE)
      case $(activity) in
      *inactive* | *failed*)
        is_complete >/dev/null 2>&1 && continue # since the last look
        if [ "$launched" -eq "$ATTEMPTS" ]; then
          logs || note "no logs"
          fail "$NAME has stopped $ATTEMPTS times by itself: see runs/$NAME/logs; the slice is still there"
        fi
        launched=$((launched + 1))
        { setup && launch; } || note "not launched"
        ;;
      esac
      ;;
    esac
    sleep "$POLL"
  done
  logs || note "no logs"
  delete
}

# What a watch runs, with its conditions: which of it comes true, only the cloud knows.
plan_watch() {
  note "every $POLL seconds: is the run complete?"
  is_complete
  note "if not, what has become of the slice?"
  state
  note "there is none:"
  create
  note "SUSPENDED, for it has been preempted:"
  delete
  note "ACTIVE: does every worker run?"
  activity
  note "if not, at most $ATTEMPTS times on the same machines:"
  setup
  launch
  note "once the run is complete:"
  logs
  delete
}

dry_run='' arguments=()
for argument; do
  case $argument in
  -h | --help) usage && exit ;;
  --dry-run) dry_run=yes ;;
  *) arguments+=("$argument") ;;
  esac
done
[ ${#arguments[@]} -eq 2 ] || fail "scripts/tpu/job.sh takes a command and a job (see --help)"
case ${arguments[0]} in
create | setup | launch | watch | logs | stop | delete) ;;
*) fail "unknown command ${arguments[0]} (see --help)" ;;
esac
job=${arguments[1]}
[[ $job == /* ]] || job=$PWD/$job
cd "$(dirname "$0")/../.."
read_job "$job"
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "no gcloud: install the Google Cloud CLI"
if [ "${arguments[0]}" = watch ] && [ -n "$dry_run" ]; then
  plan_watch
else
  "${arguments[0]}"
fi
