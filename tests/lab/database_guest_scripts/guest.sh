#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by process 1 and by every script that a test runs: starts server and agent.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export PYTHONPATH=/run/payload PYTHONDONTWRITEBYTECODE=1
socket=/run/mysqld/mysqld.sock
source /run/payload/server.sh

parameter() { sed -n "s/.*\bndm\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

# Becomes a program as a service of that name has it: its own session and control group. For the
# background: $! is the program's pid then.
service() {
    exec setsid bash -c 'echo $$ >"/sys/fs/cgroup/$0/cgroup.procs"; exec "$@"' "$@"
}

# Fails if the server does not come up. Its pid is in /run/server.pid.
start_server() {
    local options=("${server_options[@]}")
    if [ "$(parameter hugepages)" != 0 ]; then
        options+=(--large-pages)
        ulimit -l unlimited
    fi
    if [ -n "$(parameter address)" ]; then
        options+=(--bind-address=0.0.0.0 --skip-name-resolve)
    else
        options+=(--skip-networking)
    fi
    local more
    IFS=, read -ra more <<<"$(parameter options)"
    options+=("${more[@]/#/--}")
    # As its own service would, so that the server is not process 1's child with its descriptors
    service server $server --no-defaults --user=mysql --datadir=/mnt/data/mysql --socket=$socket \
        --pid-file=/run/mysqld/mysqld.pid --event-scheduler=OFF \
        --innodb-buffer-pool-size="$(parameter pool)" "${options[@]}" >>/tmp/server.log 2>&1 3>&- &
    echo $! >/run/server.pid
    for _ in $(seq 1200); do
        if admin ping >/dev/null 2>&1; then return; fi
        kill -0 "$(</run/server.pid)" || return
        sleep 0.2
    done
    return 1
}

# Fills the pool.
read_tables() {
    local table
    for table in t1 t2; do
        client -e "SELECT COUNT(*), SUM(LENGTH(c)) FROM $table FORCE INDEX (PRIMARY); SELECT SUM(k) FROM $table FORCE INDEX (k)" lab >/dev/null || return
    done
}

# Its pid is in /run/agent.pid.
start_agent() {
    service agent python3 -m nova_dmigrate.cmd.agent --config-file /run/payload/agent.conf serve >>/tmp/agent.log 2>&1 3>&- &
    echo $! >/run/agent.pid
}

# As udev does: by the names that their hosts give them
link_ports() {
    local each
    for each in /sys/class/virtio-ports/*; do
        ln -sf "/dev/${each##*/}" "/dev/virtio-ports/$(<"$each/name")"
    done
}
