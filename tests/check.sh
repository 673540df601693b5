#!/usr/bin/env bash
# Format, clippy, licences, protos, structure and manifests.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh

need cargo "install stable Rust"
python_environment
buf_tool
cargo_tool cargo-deny cargo-deny

echo "== format";    cargo fmt --all --check
echo "== protos";    buf lint proto
echo "== licences";  cargo fetch --locked --quiet; cargo deny --offline --log-level error check bans licenses sources
echo "== structure"; target/venv/bin/python tests/tidy
target/venv/bin/python tests/tidy --self-test | tail -1
echo "== manifests"; target/venv/bin/python tests/manifests/check.py
target/venv/bin/python tests/manifests/check.py --self-test | tail -1
echo "== clippy";    cargo clippy --release --locked --workspace --all-targets -- -D warnings
echo "all checks passed"
