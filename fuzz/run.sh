#!/usr/bin/env bash
# Fuzzes the codec for so many seconds (default 60), with stable Rust: the
# coverage flags that cargo-fuzz would set, without its sanitizer.
set -euo pipefail
cd "$(dirname "$0")"
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Ccodegen-units=1 --cfg fuzzing"
host=$(rustc -vV | sed -n 's/^host: //p')
cargo build --quiet --release --target "$host" --bin codec
"target/$host/release/codec" -max_total_time="${1:-60}" -max_len=4096
