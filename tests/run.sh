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
debian redis-server redis-server
node_environment
debian chromium chromium
python3 demo/fetch_models.py models
# The reference's outputs, and whether the committed weights of `digits` are
# what its training program makes.
if ! [ target/golden/.done -nt tests/python/golden.py ] ||
    ! [ target/golden/.done -nt tests/python/train_digits.py ]; then
    target/venv/bin/python tests/python/golden.py target/golden
    target/venv/bin/python tests/python/train_digits.py --check
    touch target/golden/.done
fi
cargo build --release --locked --workspace --bins

log=target/nextest.log
status=0
cargo nextest run --release --locked --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?
# The line that says it plainly, from nextest's summary.
python3 - "$log" <<'END'
import re, sys
text = re.sub(r"\x1b\[[0-9;]*m", "", open(sys.argv[1], errors="replace").read())
summary = next((l for l in reversed(text.splitlines()) if l.strip().startswith("Summary")), "")
count = lambda words: sum(int(n) for n in re.findall(rf"(\d+) (?:{words})", summary))
print(f"{count('passed')} passed, {count('failed|timed out|exec failed')} failed")
END
exit "$status"
