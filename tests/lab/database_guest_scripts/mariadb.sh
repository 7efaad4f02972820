#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Sourced in a guest, and in the chroot of the image that is being made: what is MariaDB's own.
server=/usr/sbin/mariadbd
server_options=(--skip-log-bin)
seed_options=(--innodb-log-file-size=32M)

client() { mariadb --no-defaults --socket="$socket" "$@"; }
admin() { mariadb-admin --no-defaults --socket="$socket" "$@"; }
# $1: the data directory, which is empty
install_server() { mariadb-install-db --no-defaults --user=mysql --datadir="$1" --force --skip-test-db >/dev/null; }
