# Installs what tests and checks need, by name, into target/. Sourced.
# A tool that cannot be had is an error that names it.

tools=target/tools
mkdir -p "$tools"
export PATH="$PWD/$tools/bin:$PATH"

need() { # COMMAND HINT
    command -v "$1" >/dev/null || { echo "error: '$1' is needed: $2" >&2; exit 1; }
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

cargo_tool() { # COMMAND CRATE: builds a cargo tool if it is missing
    command -v "$1" >/dev/null && return
    echo "building $2, once" >&2
    cargo install --quiet --locked "$2"
    export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    need "$1" "cargo install $2 did not bring it"
}

python_environment() { # the virtual environment of the tests
    need python3 "install Python 3 with venv and pip"
    local stamp=target/venv/.stamp
    local wanted
    wanted=$(cat tests/python/requirements.txt tests/manifests/requirements.txt | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    echo "installing the Python packages of the tests, once" >&2
    python3 -m venv target/venv
    target/venv/bin/pip install --quiet --disable-pip-version-check \
        -r tests/python/requirements.txt -r tests/manifests/requirements.txt
    echo "$wanted" >"$stamp"
}

buf_tool() { # buf, from the npm registry
    command -v buf >/dev/null && return
    debian npm npm
    npm install --silent --no-fund --no-audit --prefix "$tools/npm" @bufbuild/buf@1 >/dev/null
    mkdir -p "$tools/bin"
    ln -sf "../npm/node_modules/.bin/buf" "$tools/bin/buf"
    need buf "npm install @bufbuild/buf did not bring it"
}

node_environment() { # the Node packages of the tests, as their lock has them
    debian node nodejs
    debian npm npm
    local stamp=target/node/.stamp
    local wanted
    wanted=$(cat tests/node/package.json tests/node/package-lock.json | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    echo "installing the Node packages of the tests, once" >&2
    mkdir -p target/node
    cp tests/node/.npmrc tests/node/package.json tests/node/package-lock.json target/node/
    (cd target/node && npm ci --ignore-scripts >/dev/null)
    echo "$wanted" >"$stamp"
}
