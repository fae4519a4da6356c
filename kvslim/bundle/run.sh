#!/bin/sh
# Runs the artifact beside this script: ./run [chat|serve|generate|bench|inspect|verify|doctor] [OPTIONS]
# The first start checks the files and makes an environment from the wheels. It needs no network.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-$(command -v python@PYTHON@ || echo python3)}

fail() {
    printf 'error: %s\n  where: %s\n  fix: %s\n' "$1" "$2" "$3" >&2
    exit 4
}

install() {
    [ "$(uname -m)" = @MACHINE@ ] || fail "this bundle is for @MACHINE@" "$(uname -m)" "kvslim bundle --platform linux-$(uname -m)"
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != tuple(map(int, "@PYTHON@".split("."))))' 2>/dev/null ||
        fail "this bundle needs Python @PYTHON@" "$python" "set PYTHON to its path, or kvslim bundle --python with yours"
    (cd -- "$here" && sha256sum -c SHA256SUMS >/dev/null) || fail "a file was changed or is missing" "$here" "unpack it again"
    rm -rf -- "$here/environment"
    "$python" -m venv --without-pip "$here/environment" ||
        fail "no environment can be made here" "$here" "install Python's module venv, or move the folder to where you can write"
    for pip in "$here"/pip/*.whl; do break; done
    "$here/environment/bin/python" "$pip/pip" --isolated --disable-pip-version-check --quiet \
        install --no-index --no-deps --no-compile --no-warn-script-location "$here"/wheels/*.whl ||
        fail "the wheels cannot be installed" "$here/environment" "free some space, and start again"
    touch "$here/environment/ready"
}

[ -e "$here/environment/ready" ] && [ -x "$here/environment/bin/python" ] || install
verb=${1:-chat}
[ $# -eq 0 ] || shift
[ "$verb" = doctor ] || set -- "$here/artifact" "$@"
exec "$here/environment/bin/python" -m kvslim.cli.app "$verb" "$@"
