#!/usr/bin/env bash
# Installs what the tests need and runs them all, or those that the arguments
# select, which are nextest's.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh

need cargo "install stable Rust"
need cc "install a C compiler"
# The network and the compiler at the same time.
environment=target/environment.log
(set -e; test_environment) >"$environment" 2>&1 &
installing=$!
build_and_lint
wait "$installing" || { cat "$environment"; exit 1; }
grep "^== " "$environment"

log=target/nextest.log
status=0
[ $# -gt 0 ] || set -- --workspace
cargo nextest run --locked --no-fail-fast --final-status-level slow "$@" 2>&1 |
    tee "$log" || status=$?
# The line that says it plainly, from nextest's summary.
python3 - "$log" <<'END'
import re, sys
text = re.sub(r"\x1b\[[0-9;]*m", "", open(sys.argv[1], errors="replace").read())
summary = next((l for l in reversed(text.splitlines()) if l.strip().startswith("Summary")), "")
count = lambda words: sum(int(n) for n in re.findall(rf"(\d+) (?:{words})", summary))
print(f"{count('passed')} passed, {count('failed|timed out|exec failed')} failed")
END
exit "$status"
