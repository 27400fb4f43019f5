#!/usr/bin/env bash
# Runs the dashboard in a real terminal (tmux), presses keys, and looks at what is on the screen. Prints the screens.
#
#   bash tools/dashboard_check.sh [target/release/dashboard]
#
# Builds the example when no program is given. Without tmux it says so and checks nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v tmux >/dev/null; then
  echo "skipped: tmux is not installed"
  exit 0
fi
program=${1:-}
if [ -z "$program" ]; then
  cargo build --release --quiet -p dashboard
  program=${CARGO_TARGET_DIR:-target}/release/dashboard
fi
program=$(realpath "$program")
work=$(mktemp -d)
# A server of its own, so that nobody's sessions are touched.
terminal() { tmux -S "$work/socket" -f /dev/null "$@"; }
trap 'terminal kill-server 2>/dev/null || true; rm -rf "$work"' EXIT

screen() { terminal capture-pane -p -t check; }
press() { terminal send-keys -t check "$@"; }
fail() { echo "FAILED: $1"; screen; exit 1; }

# until_shown TEXT: waits for a text on the screen.
until_shown() {
  for _ in $(seq 300); do
    if screen | grep -qF -- "$1"; then return; fi
    sleep 0.1
  done
  fail "not on the screen: $1"
}

until_gone() {
  for _ in $(seq 100); do
    if ! screen | grep -qF -- "$1"; then return; fi
    sleep 0.1
  done
  fail "still on the screen: $1"
}

start() { press "clear; $program $*; echo code=\$?; stty -a | grep -o -- '-*icanon'" Enter; }

# until_ended CODE: waits for the shell's line after the program, and for a terminal that reads lines again.
until_ended() {
  until_shown "code=$1"
  for _ in $(seq 50); do
    if screen | grep -qx 'icanon'; then return; fi
    sleep 0.1
  done
  fail "the terminal is not as it was"
}

terminal new-session -d -s check -x 150 -y 44 "bash --norc"

echo "== a request, figures, trees"
start --devices cpu,cpu --split 5,3 --max-tokens 60 --ignore-eos
until_shown "ended: length"
screen
for text in "Once upon a time" "tokens/s" "TTFT ms" "Stage 1 (cpu)" "busy" "bubbles" "% of memory" "Forward" "Weights" "Next request" "INFO loaded" "Ctrl-C quit"; do
  until_shown "$text"
done

echo "== keys fold and unfold, and scroll"
press Tab Tab
press Down Down Down Down Down Right Down Down Right
until_shown "attn_qkv_proj"
screen
press Left
until_gone "attn_qkv_proj"

echo "== another request"
press BTab BTab
press -l "One day a little dog"
until_shown "One day a little dog"
press Enter
until_shown "> One day a little dog"

echo "== sizes"
for size in 60x12 20x5 5x2 1x1 200x60 150x44; do
  terminal resize-window -t check -x "${size%x*}" -y "${size#*x}"
  sleep 0.4
done
until_shown "Figures"

echo "== quitting gives the terminal back"
press C-c
until_ended 0

echo "== cancelling a long request"
start --devices cpu,cpu --no-bandwidth --link 100 --max-tokens 400 --ignore-eos --prompt Once
until_shown "generating"
press Escape
until_shown "cancelled"
press Tab q
until_ended 0

echo "== a panic gives the terminal back and shows its message"
start --devices cpu,cpu --no-bandwidth --panic-after 500
until_shown "asked for by --panic-after"
until_ended 101
screen
echo "dashboard: all checks passed"
