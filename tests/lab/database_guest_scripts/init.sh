#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Process 1 of the database guest: makes the volume, starts server and agent, then does what the
# test says on a port of its own. A line is a number and a script in base64; the answer is the number,
# "ok" or "failed", and the output in base64. Parameters are on the kernel's command line.
export BASH_ENV=/run/payload/guest.sh
source $BASH_ENV
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /mnt
# As systemd does: each service has a control group of its own, so that a server of many threads gets
# no more of the processor than the agent
mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo +cpu >/sys/fs/cgroup/cgroup.subtree_control &&
    mkdir /sys/fs/cgroup/server /sys/fs/cgroup/agent || echo "init: no control groups"
mount -t devpts devpts /dev/pts 2>/dev/null
ln -sf /proc/self/fd /dev/fd
mkdir -p /run/mysqld /run/lvm /mnt/data /dev/virtio-ports /dev/shm
chown mysql:mysql /run/mysqld
exec </dev/null >/dev/console 2>&1

give_up() { echo "init: $*"; tail -n 20 /tmp/*.log; sync; poweroff -f || echo o >/proc/sysrq-trigger; sleep 60; }

for module in virtio_console dm-mod xfs; do modprobe "$module" || give_up "no $module"; done
disk=/dev/vdb
for _ in $(seq 100); do if [ -b $disk ]; then break; fi; sleep 0.1; done

layout=$(parameter layout)
case $layout in
partition)
    echo 'start=2048' | sfdisk --quiet $disk || give_up partition table
    device=${disk}1
    mkfs.ext4 -q -E lazy_itable_init=0,nodiscard $device || give_up mkfs.ext4
    ;;
lvm)
    # There is no udev: LVM makes the nodes. Two pieces, the later one first on the disk
    lvm() { /sbin/lvm "$@" --config 'activation{udev_sync=0 udev_rules=0} backup{backup=0 archive=0} devices{use_devicesfile=0}'; }
    lvm pvcreate -q $disk && lvm vgcreate -q lab $disk &&
        lvm lvcreate -q --zero n --wipesignatures n -l 20%VG -n first lab &&
        lvm lvcreate -q --zero n --wipesignatures n -l 40%VG -n data lab && lvm lvremove -q -f lab/first &&
        lvm lvextend -q -l +100%FREE lab/data || give_up LVM
    device=/dev/mapper/lab-data
    mkfs.xfs -q -f -K $device || give_up mkfs.xfs
    ;;
kept) device=${disk}1 ;;
*) give_up "layout '$layout'" ;;
esac
mount $device /mnt/data || give_up mount
if [ "$layout" != kept ]; then cp -a /srv/seed/mysql /mnt/data/ || give_up copy; fi
sync

address=$(parameter address)
if [ -n "$address" ]; then
    modprobe virtio_net && busybox ip link set lo up && busybox ip link set eth0 up &&
        busybox ip address add "$address/24" dev eth0 || give_up "no network"
fi

echo "$(parameter hugepages)" >/proc/sys/vm/nr_hugepages
start_server || give_up "no server"
# What is kept has a list of what to read by itself
if [ "$layout" != kept ]; then read_tables || give_up "the database cannot be read"; fi
link_ports
start_agent

exec 3<>/dev/virtio-ports/lab.command || give_up "no port for commands"
echo READY >&3
while true; do
    # The test's end may be closed for a while
    if ! read -r number line <&3; then sleep 0.1; continue; fi
    base64 -d <<<"$line" >/tmp/script 2>/dev/null
    if bash /tmp/script </dev/null >/tmp/output 2>&1 3>&-; then verdict=ok; else verdict=failed; fi
    echo "$number $verdict $(base64 -w0 /tmp/output)" >&3
done
