#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes the volume of a guest of the demo: the database of the guest's image, a load's tables, and
# the list of pages with which the guest's server fills its pool when it starts. Loaded here and not
# in the guest, whose processor is emulated. Runs in namespaces of its own, as their first process;
# all that it mounts and starts ends with it.
# $1: the guest's root disk, $2: the volume, all of which is its first partition, $3: an empty directory,
# $4: what the guest's scripts know of its server, $5: MiB of the pool, then the command that makes
# the tables, in which @SOCKET@ stands for that of the server
set -euo pipefail
root_disk=$1 volume=$2 root=$3 script=$4 pool=$5
shift 5
begin=$((2048 * 512))

mount -t proc proc /proc
ip link set lo up
mkfs.ext4 -q -F -b 4096 -E "offset=$begin,lazy_itable_init=0,nodiscard" "$volume" $((($(stat -c %s "$volume") - begin) / 1024))k
mount -o loop,ro,noload "$root_disk" "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
for each in tmp run mnt; do mount -t tmpfs tmpfs "$root/$each"; done
mkdir "$root/mnt/data"
mount -o "loop,offset=$begin" "$volume" "$root/mnt/data"
cp -a "$root/srv/seed/mysql" "$root/mnt/data/"

socket=/run/load.sock
source "$script"
inside() { chroot "$root" /usr/bin/env PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
inside $server --no-defaults --user=mysql --datadir=/mnt/data/mysql --socket=$socket \
    --pid-file=/tmp/load.pid --skip-networking --event-scheduler=OFF \
    --innodb-buffer-pool-size="${pool}M" --innodb-buffer-pool-dump-pct=100 \
    --innodb-flush-log-at-trx-commit=0 --innodb-doublewrite=0 --innodb-io-capacity=20000 \
    --innodb-io-capacity-max=40000 "${server_options[@]}" >"$root/tmp/server.log" 2>&1 &
server_pid=$!
trap 'tail -n 20 "$root/tmp/server.log" >&2' ERR
export -f client admin
export socket
for _ in $(seq 600); do
    if inside bash -c 'admin ping' >/dev/null 2>&1; then break; fi
    kill -0 $server_pid
    sleep 0.2
done
inside bash -c client <<SQL
CREATE DATABASE sbtest;
CREATE USER 'load'@'%' IDENTIFIED BY 'load';
GRANT ALL ON *.* TO 'load'@'%';
SQL
"${@//@SOCKET@/$root$socket}" >&2
inside bash -c client <<SQL
SET GLOBAL innodb_fast_shutdown = 0;
SQL
inside bash -c 'admin shutdown'
wait $server_pid
umount "$root/mnt/data"
