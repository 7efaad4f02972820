#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install the Debian packages of bindep.txt's "test" profile that are missing. Quick if none is.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# npm is large, and often there without being a package of Debian's.
installed() {
    if [ "$1" = npm ] && command -v npm >/dev/null; then return 0; fi
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
}

missing=()
while read -r package _; do
    installed "$package" || missing+=("$package")
done < <(grep -E '^[a-z0-9][^ ]* \[.*\btest\b.*\]' bindep.txt)

# Packages of servers start them when they are installed; the tests start their own. Debian asks this
# program first, and 101 is its "no". One that is there already is somebody's decision: it stays.
forbid_services() {
    local policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then return; fi
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
}

# The integration suite fetches its guest's kernel with "apt-get download": that wants package lists
if [ "${#missing[@]}" -gt 0 ] || [ -z "$(apt-cache policy linux-image-cloud-amd64 2>/dev/null)" ]; then
    say "System packages: ${missing[*]:-package lists only}"
    apt update
fi
if [ "${#missing[@]}" -gt 0 ]; then
    log=$STATE/apt.log
    forbid_services
    apt install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        exit 1
    }
fi
