#!/usr/bin/env bash
# The compiler of the workspace's crates in checks and tests: clippy with
# warnings denied, so that one build gives the lints and what the tests run.
# The engine as the tests run it comes from rustc itself, since clippy turns
# optimizations off that the forward pass needs (mir_opt_level); the same code
# is linted when its unit tests are compiled.
set -euo pipefail
case " $* " in
*" --test "*) ;;
*" --crate-name engine "*) exec "$@" -D warnings ;;
esac
rustc=$1
shift
exec clippy-driver "$rustc" "$@"
