#!/usr/bin/env bash
# Tokens a second of one generation, several times over: the least, the mean and the most.
#
#   tools/run_throughput.sh                                    the demo model
#   MODEL=path/or/hub-id tools/run_throughput.sh               another
#   METALLIC_GEMV_COLS_PER_TG=8 tools/run_throughput.sh        another shape of Metal products
#   tools/run_throughput.sh --no-fused                         flags go to test_pipeline
#
# ITERATIONS (5), MAX_TOKENS (50), MODEL, DEVICES (metal:0 on a Mac, else cpu). Nothing is printed while tokens come, and
# the seed is fixed. "total" counts the prompt's time, "decode" what comes after the first token.
set -euo pipefail
cd "$(dirname "$0")/.."

iterations=${ITERATIONS:-5}
case $iterations in *[!0-9]* | '' | 0) echo "run_throughput: ITERATIONS is '$iterations', expected a number from 1" >&2; exit 1 ;; esac
features=()
devices=${DEVICES:-cpu}
if [ "$(uname)" = Darwin ]; then
  features=(--features metal)
  devices=${DEVICES:-metal:0}
fi
arguments=(--devices "$devices" --max-tokens "${MAX_TOKENS:-50}" --ignore-eos --output-format none --seed 42)
[ -z "${MODEL:-}" ] || arguments+=(--model "$MODEL")

cargo build --release --quiet ${features[@]+"${features[@]}"} --example test_pipeline
results=$(mktemp)
trap 'rm -f "$results"' EXIT
for iteration in $(seq "$iterations"); do
  line=$(target/release/examples/test_pipeline "${arguments[@]}" "$@" 2>&1 >/dev/null | tail -1)
  rates=$(sed -n 's/.*generated at \([0-9.]*\) tokens\/s.*then \([0-9.]*\) tokens\/s.*/\1 \2/p' <<<"$line")
  [ -n "$rates" ] || { echo "run_throughput: iteration $iteration failed: $line" >&2; exit 1; }
  echo "$rates" >> "$results"
done
awk -v devices="$devices" '
  function add(i, value) { sum[i] += value; if (NR == 1 || value < least[i]) least[i] = value; if (value > most[i]) most[i] = value }
  { add(1, $1); add(2, $2) }
  END {
    printf "%d iterations on %s\n", NR, devices
    printf "tokens/s total   min %8.2f  avg %8.2f  max %8.2f\n", least[1], sum[1] / NR, most[1]
    printf "tokens/s decode  min %8.2f  avg %8.2f  max %8.2f\n", least[2], sum[2] / NR, most[2]
  }' "$results"
