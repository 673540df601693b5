#!/usr/bin/env bash
# Format, clippy, licences, protos, structure and manifests.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh

need cargo "install stable Rust"
# The network and the compiler at the same time.
environment=target/environment.log
(set -e; python_environment; buf_tool; cargo_tool cargo-deny) >"$environment" 2>&1 &
installing=$!

timed format cargo fmt --all --check
timed clippy cargo clippy --locked --workspace --all-targets -- -D warnings
cargo fetch --locked --quiet
wait "$installing" || { cat "$environment"; exit 1; }
timed licences cargo deny --offline --log-level error check bans licenses sources
timed protos buf lint proto
timed structure target/venv/bin/python tests/tidy
target/venv/bin/python tests/tidy --self-test | tail -1
timed manifests target/venv/bin/python tests/manifests/check.py
target/venv/bin/python tests/manifests/check.py --self-test | tail -1
echo "all checks passed"
