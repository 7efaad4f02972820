#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Sourced in a guest, and in the chroot of the image that is being made: what is MySQL's own.
server=/usr/sbin/mysqld
server_options=(--skip-log-bin --mysqlx=OFF --secure-file-priv=NULL)
seed_options=()

client() { mysql --no-defaults --socket="$socket" "$@"; }
admin() { mysqladmin --no-defaults --socket="$socket" "$@"; }
# $1: the data directory, which is empty
install_server() { $server --no-defaults --user=mysql --datadir="$1" --initialize-insecure; }
