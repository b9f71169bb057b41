#!/usr/bin/env bash
# Installs Debian packages where that is possible:  debian_packages.sh REASON PACKAGE...
# All of them are optional: where it is not possible it says so in one line and succeeds.
set -uo pipefail
reason=$1
shift

skip() {
    echo "make install: going on without ${missing[*]} ($1); $reason"
    exit 0
}

missing=("$@")
command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || skip "no Debian system"
missing=()
for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
        missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || skip "neither root nor sudo without a password"
    as_root=(sudo -n)
fi

apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=30 "$@" </dev/null >/dev/null 2>&1
}

echo "make install: installing ${missing[*]} with apt-get"
apt update
apt install --yes --no-install-recommends "${missing[@]}" || skip "apt-get could not install them"
