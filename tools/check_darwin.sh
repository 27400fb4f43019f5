#!/usr/bin/env bash
# Type-checks the code for Apple GPUs on a machine that is none.
#
#   tools/check_darwin.sh                          metal-ext and candle-pipeline, check and clippy
#   tools/check_darwin.sh -p metal-ext --tests     any arguments go to cargo instead
#
# Code behind `cfg(target_os = "macos")` is seen by no compiler on Linux. cargo can check it there: with -Zbuild-std it
# checks the standard library from source for aarch64-apple-darwin, so neither that target's std nor Apple's SDK is
# needed. Nothing is linked or run, so crates with a little C for the target are given a compiler that writes empty
# objects. The download of models brings a lot of C and is left out (--no-default-features).
#
# Needs a nightly toolchain with the standard library's source:
#   rustup toolchain install nightly --component rust-src,clippy
set -euo pipefail
cd "$(dirname "$0")/.."

toolchain=${DARWIN_TOOLCHAIN:-nightly}
sysroot=$(rustc "+$toolchain" --print sysroot 2>/dev/null) || {
  echo "check_darwin: no $toolchain toolchain; rustup toolchain install nightly --component rust-src,clippy" >&2
  exit 1
}
if [ ! -e "$sysroot/lib/rustlib/src/rust/library/std/Cargo.toml" ]; then
  echo "check_darwin: $toolchain lacks the standard library's source; rustup +$toolchain component add rust-src" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/empty" <<'SCRIPT'
#!/bin/sh
# Stands in for a C compiler and an archiver: the file that is asked for is there afterwards, and empty.
for argument; do
  case "$previous $argument" in "-o "*) : > "$argument" ;; esac
  case "$argument" in *.a) : > "$argument" ;; esac
  previous=$argument
done
SCRIPT
chmod +x "$work/empty"
export CC_aarch64_apple_darwin="$work/empty" AR_aarch64_apple_darwin="$work/empty"

darwin() {
  local command=$1
  shift
  cargo "+$toolchain" "$command" -Zbuild-std=std,panic_abort --target aarch64-apple-darwin --target-dir target/darwin "$@"
}

if [ $# -gt 0 ]; then
  darwin check "$@"
  exit
fi
darwin clippy -p metal-ext --features metal --tests --benches -- -D warnings
darwin clippy -p candle-pipeline --no-default-features --features metal --all-targets -- -D warnings
