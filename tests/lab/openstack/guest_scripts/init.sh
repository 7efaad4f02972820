#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Process 1 of a server of Nova's: mounts its volume, which Nova has attached, and starts database
# and agent. Clients ask the database, hosts ask the agent, and the lab has a shell (shell.py).
export BASH_ENV=/run/payload/guest.sh
source $BASH_ENV
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /mnt
mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo +cpu >/sys/fs/cgroup/cgroup.subtree_control &&
    mkdir /sys/fs/cgroup/server /sys/fs/cgroup/agent || echo "init: no control groups"
mount -t devpts devpts /dev/pts 2>/dev/null
ln -sf /proc/self/fd /dev/fd
mkdir -p /run/mysqld /mnt/data /dev/shm
chown mysql:mysql /run/mysqld
exec </dev/null >/dev/console 2>&1

give_up() { echo "init: $*"; tail -n 20 /tmp/*.log; sync; echo o >/proc/sysrq-trigger; sleep 60; }

for module in virtio_net dm-mod; do modprobe $module || give_up "no $module"; done
address=$(parameter address)
busybox ip link set lo up && busybox ip link set eth0 up &&
    busybox ip address add "$address/24" dev eth0 || give_up "no network"
for _ in $(seq 600); do if [ -b /dev/vdb1 ]; then break; fi; sleep 0.1; done
mount /dev/vdb1 /mnt/data || give_up "no volume"

# Who this is, Nova tells by the firmware
instance=$(tr A-F a-f </sys/class/dmi/id/product_uuid)
sed -i "s/@INSTANCE@/$instance/g" /run/payload/agent.conf
start_server || give_up "no server"
start_agent
echo "init: READY $instance"
tail -n +1 -F /tmp/agent.log &
python3 /run/payload/shell.py "$(parameter shell)" &
# As systemd does, which may be told to stop it
while true; do
    wait "$(</run/agent.pid)"
    sleep 1
    while [ -e /run/agent.stopped ]; do sleep 1; done
    start_agent
done
