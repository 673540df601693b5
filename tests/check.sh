#!/usr/bin/env bash
# Format, lints, licences, protos, structure and manifests.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh

need cargo "install stable Rust"
# The network and the compiler at the same time.
environment=target/checks.log
(set -e; once python_environment; once buf_tool; once cargo_tool cargo-deny; once debian promtool prometheus) >"$environment" 2>&1 &
installing=$!

timed format cargo fmt --all --check
build_and_lint
cargo fetch --locked --quiet
wait "$installing" || { cat "$environment"; exit 1; }
timed licences cargo deny --offline --log-level error check bans licenses sources
timed golden sha256sum --check --quiet tests/golden/programs.sha256
timed protos buf lint proto
timed structure target/venv/bin/python tests/tidy
target/venv/bin/python tests/tidy --self-test | tail -1
timed manifests target/venv/bin/python tests/manifests/check.py
target/venv/bin/python tests/manifests/check.py --self-test | tail -1
echo "all checks passed"
