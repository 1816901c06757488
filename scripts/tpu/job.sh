#!/usr/bin/env bash
# Manages a training run on a Cloud TPU slice, from the request for the machines to their return.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/tpu/job.sh COMMAND JOB [--dry-run]

  create   requests the slice as a queued resource
  setup    copies the commit to every worker, installs the environment and mounts the bucket
  launch   starts python scripts/train.py on every worker, independent of the ssh connection; stops an earlier one first
  watch    does all of these, and repeats them after each preemption, until the run is complete; then logs and delete
  logs     fetches every worker's log to runs/NAME/logs
  stop     sends SIGTERM: the run saves a checkpoint; launch resumes it
  delete   gives the slice back

JOB is a file of settings, such as scripts/tpu/example.job.
--dry-run prints the commands, quoted for a shell, and runs none.
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the arguments on one line, quoted for a shell.
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

# Runs a command that reaches the cloud or writes a file; in a dry run, prints it instead.
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
  bash -n "$1" 2>/dev/null || fail "$1 is not valid bash: see scripts/tpu/example.job"
  # shellcheck source=scripts/tpu/example.job
  . "$1"
  for name in NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET TRAIN; do
    [ -n "${!name:-}" ] || fail "$1 does not set $name"
  done
  [[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME=$NAME: use lower-case letters, digits and - only, a letter first"
  [[ $BUCKET =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "BUCKET=$BUCKET: give only the name, without gs:// and folders"
  [[ $SPOT =~ ^(yes|no)$ ]] || fail "SPOT=$SPOT: must be yes or no"
  [[ $ATTEMPTS =~ ^[1-9][0-9]*$ ]] || fail "ATTEMPTS=$ATTEMPTS: must be a positive number"
  [[ $POLL =~ ^[1-9][0-9]*$ ]] || fail "POLL=$POLL: must be a positive number of seconds"
  for name in "${TRAIN[@]}"; do
    [[ $name != --workdir* ]] || fail "TRAIN must not set --workdir: it is $NAME in the bucket"
  done
  # Resolve the commit once, so that a watch gives every slice the same one.
  commit=$(git rev-parse --verify --quiet "$COMMIT^{commit}") || fail "COMMIT=$COMMIT: not a commit of this repository"
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
  [ -z "$(git status --porcelain)" ] || note "uncommitted changes are not copied: the run trains commit $commit"
  run mkdir -p build
  run git archive --format=tar.gz --output="$archive" "$commit"
  slice tpu-vm scp "$archive" "$NAME:" --worker=all
  on_all_workers "$(worker_setup)"
}

# Prints the setup script of a worker. The images have Python 3.10 and JAX needs 3.11, so uv installs one. gcsfuse runs
# without its caches, which would hide from one worker what another has written.
worker_setup() {
  cat <<END
set -eu
$PREPARE
mkdir -p $NAME bucket
find $NAME -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf $NAME.tar.gz -C $NAME
if ! mountpoint -q bucket; then
  command -v gcsfuse >/dev/null || { echo "error: no gcsfuse on \$(hostname): set PREPARE to install it" >&2; exit 2; }
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

# Prints the launch script of a worker. Bucket and run are systemd units so that, at a preemption, the run ends (and
# saves) before the bucket is unmounted. The limits are set because a unit does not inherit those of a login, and TPUs
# lock much memory.
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

# Fails both if the run is not complete and if that is unknown, so only a complete run ends a watch with success.
is_complete() { run gcloud storage ls "gs://$BUCKET/$NAME/summary.json" --project="$PROJECT"; }

# Prints one line per worker: active, inactive or failed. Fails only if the workers cannot be reached.
activity() { on_all_workers "systemctl is-active $NAME || true"; }

# Prints the state of the slice; prints nothing if it does not exist.
state() { slice queued-resources list --filter="name~/$NAME\$" --format='value(state.state)'; }

watch() {
  local launched=0 now
  until is_complete >/dev/null 2>&1; do
    now=$(state) || now=UNKNOWN # a network failure: ask again next time
    note "$(date '+%F %T') ${now:-no slice}"
    case $now in
    '') create ;;
    SUSPENDED) delete && launched=0 ;; # preempted: the next round creates it again
    FAILED) fail "the request for $NAME failed: see the reason in the console, then delete it" ;;
    ACTIVE)
      case $(activity) in
      *inactive* | *failed*)
        is_complete >/dev/null 2>&1 && continue # it finished since the last check
        if [ "$launched" -eq "$ATTEMPTS" ]; then
          logs || note "no logs"
          fail "$NAME stopped by itself $ATTEMPTS times: see runs/$NAME/logs; the slice still exists"
        fi
        launched=$((launched + 1))
        { setup && launch; } || note "launch failed"
        ;;
      esac
      ;;
    esac
    sleep "$POLL"
  done
  logs || note "no logs"
  delete
}

# Prints all commands that a watch can run, with the conditions under which it runs them.
plan_watch() {
  note "every $POLL seconds: is the run complete?"
  is_complete
  note "if not, what is the state of the slice?"
  state
  note "if there is no slice:"
  create
  note "if SUSPENDED, which means preempted:"
  delete
  note "if ACTIVE: is the run active on every worker?"
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
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud not found: install the Google Cloud CLI"
if [ "${arguments[0]}" = watch ] && [ -n "$dry_run" ]; then
  plan_watch
else
  "${arguments[0]}"
fi
