#!/usr/bin/env bash
# Runs everything from a fresh clone: environment, real text, training of a Switch Transformer and a dense T5 of the same
# FLOPs on 8 emulated devices, evaluation, a filled-in passage and a table. About 10 minutes on 2 cores plus downloads.
set -euo pipefail
if [ $# -gt 1 ] || [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  echo "usage: scripts/quickstart.sh [WORKDIR]   (default: runs/quickstart in the repository; run again, it resumes)"
  [ $# -le 1 ] || exit 2
  exit 0
fi
root=$(cd "$(dirname "$0")/.." && pwd)
workdir=${1:-$root/runs/quickstart}
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
cd "$root"
. scripts/use_environment.sh
use_environment

for model in switch dense; do
  echo "== Training $model"
  python scripts/train.py --config="configs/quickstart.py:$model" --workdir="$workdir/$model"
done
for model in switch dense; do
  echo "== Evaluating $model on the test split"
  python scripts/evaluate.py --workdir="$workdir/$model" --split=test
done
echo "== Filling in a passage"
python scripts/generate.py --workdir="$workdir/switch" \
  --prompt="And it came to pass that night, that the word of the LORD came unto <extra_id_0>, saying, Go and tell my \
<extra_id_1> David, Thus saith the LORD, Shalt thou build me an <extra_id_2> for me to dwell in?"
echo "== Comparison (validation split)"
python scripts/compare.py --workdir="$workdir/switch" --baseline="$workdir/dense"
