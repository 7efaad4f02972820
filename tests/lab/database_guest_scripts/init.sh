#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Process 1 of the database guest: makes the volume, starts server and agent, then does what the
# test says on a port of its own. A line is a script in base64; the answer is "ok" or "failed" and its output in
# base64. Parameters are on the kernel's command line.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export PYTHONPATH=/run/payload PYTHONDONTWRITEBYTECODE=1
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /mnt
mount -t devpts devpts /dev/pts 2>/dev/null
ln -sf /proc/self/fd /dev/fd
mkdir -p /run/mysqld /run/lvm /mnt/data /dev/virtio-ports /dev/shm
chown mysql:mysql /run/mysqld
exec </dev/null >/dev/console 2>&1

give_up() { echo "init: $*"; tail -n 20 /tmp/*.log; sync; poweroff -f || echo o >/proc/sysrq-trigger; sleep 60; }
parameter() { sed -n "s/.*\bndm\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

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
*) give_up "layout '$layout'" ;;
esac
mount $device /mnt/data || give_up mount
cp -a /srv/seed/mysql /mnt/data/ || give_up copy
sync

options=()
if [ "$(parameter hugepages)" != 0 ]; then
    echo "$(parameter hugepages)" >/proc/sys/vm/nr_hugepages
    options+=(--large-pages)
    ulimit -l unlimited
fi
# As its own service would, so that the server is not process 1's child with its descriptors
setsid /usr/sbin/mariadbd --no-defaults --user=mysql --datadir=/mnt/data/mysql \
    --socket=/run/mysqld/mysqld.sock --pid-file=/run/mysqld/mysqld.pid --skip-networking \
    --skip-log-bin --innodb-buffer-pool-size="$(parameter pool)" "${options[@]}" \
    >/tmp/mariadbd.log 2>&1 &
for _ in $(seq 1200); do
    if mariadb-admin --socket=/run/mysqld/mysqld.sock ping >/dev/null 2>&1; then break; fi
    sleep 0.2
done
for table in t1 t2; do
    mariadb -e "SELECT COUNT(*), SUM(LENGTH(c)) FROM $table FORCE INDEX (PRIMARY); SELECT SUM(k) FROM $table FORCE INDEX (k)" lab >/dev/null ||
        give_up "the database cannot be read"
done

for each in /sys/class/virtio-ports/*; do
    ln -sf "/dev/${each##*/}" "/dev/virtio-ports/$(<"$each/name")"
done
setsid python3 -m nova_dmigrate.cmd.agent --config-file /run/payload/agent.conf serve \
    >/tmp/agent.log 2>&1 &

exec 3<>/dev/virtio-ports/lab.command || give_up "no port for commands"
echo READY >&3
while true; do
    # The test's end may be closed for a while
    if ! read -r line <&3; then sleep 0.1; continue; fi
    base64 -d <<<"$line" >/tmp/script 2>/dev/null
    if bash /tmp/script </dev/null >/tmp/output 2>&1 3>&-; then verdict=ok; else verdict=failed; fi
    echo "$verdict $(base64 -w0 /tmp/output)" >&3
done
