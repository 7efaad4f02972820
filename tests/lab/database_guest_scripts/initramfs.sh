#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# The initramfs: finds the root disk, which stays read-only, and goes on there.
box=/bin/busybox
$box mkdir -p /proc /sys /dev /root
$box mount -t proc proc /proc
$box mount -t sysfs sysfs /sys
$box mount -t devtmpfs devtmpfs /dev
while read -r module; do $box insmod "/modules/$module"; done </modules/list
until [ -b /dev/vda ]; do $box sleep 0.1; done
$box mount -t ext4 -o ro,noload /dev/vda /root
$box mount -t tmpfs tmpfs /root/run
$box cp -r /payload /root/run/
for each in dev sys proc; do $box mount -o move "/$each" "/root/$each" || $box mount --move "/$each" "/root/$each"; done
exec $box switch_root /root /bin/bash /run/payload/init.sh
