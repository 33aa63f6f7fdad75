#!/usr/bin/env bash
# require.sh PROGRAM:PACKAGE...   installs the Debian packages of the programs that are missing.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
packages=()
for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null || packages+=("${pair#*:}")
done
[ ${#packages[@]} = 0 ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "missing: ${packages[*]}; install them as root: apt-get install ${packages[*]}" >&2
    exit 1
fi
apt-get update -qq
apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends "${packages[@]}"
