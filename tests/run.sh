#!/usr/bin/env bash
# Installs what the tests need and runs them all.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh

need cargo "install stable Rust"
need cc "install a C compiler"
cargo_tool cargo-nextest cargo-nextest
python_environment
buf_tool
python3 demo/fetch_models.py models
[ -f target/golden/.done ] && [ target/golden/.done -nt tests/python/golden.py ] || {
    target/venv/bin/python tests/python/golden.py target/golden
    target/venv/bin/python tests/python/train_digits.py --held-out target/golden/digits.json
    touch target/golden/.done
}
cargo build --release --locked --workspace --bins

log=target/nextest.log
status=0
cargo nextest run --release --locked --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?
summary=$(grep -aE '^ *Summary' "$log" | tail -1 | sed 's/\x1b\[[0-9;]*m//g')
passed=$(grep -oE '[0-9]+ passed' <<<"$summary" | grep -oE '[0-9]+' || echo 0)
failed=$(grep -oE '[0-9]+ (failed|timed out|exec failed)' <<<"$summary" | grep -oE '[0-9]+' | paste -sd+ | bc || true)
echo "${passed:-0} passed, ${failed:-0} failed"
exit "$status"
