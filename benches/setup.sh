#!/usr/bin/env bash
# Installs what the benchmarks are compared with: nginx, HAProxy and wrk from
# Debian, and from PyPI into target/venv what the arguments name, files of
# requirements; without any, what `make bench` needs; with --debian, none.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
[ -x "$(command -v nginx)" ] || missing+=(nginx-light)
[ -x "$(command -v haproxy)" ] || missing+=(haproxy)
[ -x "$(command -v wrk)" ] || missing+=(wrk)

if [ ${#missing[@]} -gt 0 ]; then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if [ -z "$(command -v sudo)" ]; then
      echo "missing: ${missing[*]}; install them as root with apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  # The packages would start their services on the usual ports. This is
  # Debian's way to forbid that while they are installed.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

[ "${1:-}" = --debian ] && exit
requirements=("${@:-benches/requirements.txt}")
[ -x target/venv/bin/python ] || python3 -m venv target/venv
target/venv/bin/pip install --quiet --disable-pip-version-check \
  "${requirements[@]/#/--requirement=}"
