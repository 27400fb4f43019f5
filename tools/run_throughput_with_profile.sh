#!/usr/bin/env bash
# The same as run_throughput.sh, and then where the time goes. Much slower, and what is profiled is not what is fast: for
# attribution only, never for a number to report.
#
# Takes the same variables. Flags go to both examples, so only those that every example knows.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/run_throughput.sh "$@"
echo
echo "== where the time goes"
features=()
devices=${DEVICES:-cpu}
if [ "$(uname)" = Darwin ]; then
  features=(--features metal)
  devices=${DEVICES:-metal:0}
fi
arguments=(--devices "$devices" --max-tokens "${MAX_TOKENS:-50}" --ignore-eos --seed 42)
[ -z "${MODEL:-}" ] || arguments+=(--model "$MODEL")
cargo run --release --quiet ${features[@]+"${features[@]}"} --example profile_pipeline -- "${arguments[@]}" "$@"
