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
    expected=$(cat tests/python/requirements.txt tests/manifests/requirements.txt | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$expected" ] && return
    echo "installing the Python packages of the tests, once" >&2
    python3 -m venv target/venv
    # Modules are compiled when they are imported: most never are.
    target/venv/bin/pip install --quiet --disable-pip-version-check --no-compile \
        -r tests/python/requirements.txt -r tests/manifests/requirements.txt
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
    timed "Python packages" python_environment
    cargo_tool cargo-nextest
    buf_tool
    debian redis-server redis-server
    timed "Node packages" node_environment
    timed "Chromium" debian chromium chromium
    timed "models" python3 demo/fetch_models.py models
    timed "reference outputs" reference_outputs
}

# The reference's outputs, and whether the committed weights of `digits` are
# what its training program makes.
reference_outputs() {
    [ target/golden/.done -nt tests/python/golden.py ] &&
        [ target/golden/.done -nt tests/python/train_digits.py ] && return
    target/venv/bin/python tests/python/golden.py target/golden
    target/venv/bin/python tests/python/train_digits.py --check
    touch target/golden/.done
}
