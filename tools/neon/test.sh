#!/usr/bin/env bash
# Runs the kernels' tests on an emulated aarch64 CPU, see README.md. Arguments go to the tests.
set -euo pipefail
cd "$(dirname "$0")"
target=aarch64-unknown-linux-gnu
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-../../target/neon}
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc

# With the target's standard library where rustup has installed it, from its source otherwise.
cargo=(cargo)
std=()
if ! ls "$(rustc --print target-libdir --target $target)"/libstd-* >/dev/null 2>&1; then
  cargo=(cargo +nightly)
  std=(-Zbuild-std=std,panic_abort)
fi

# One CPU with the dot product instructions, one without.
for cpu in max cortex-a72; do
  echo "== $cpu"
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $cpu"
  "${cargo[@]}" test "${std[@]}" --target $target --release --lib -- "$@"
done
