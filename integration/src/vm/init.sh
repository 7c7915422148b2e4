#!/bin/busybox sh
# The first program of a guest. OC_V4 and OC_V6 come from the kernel's command line.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid,nodev run /run
mount -t tmpfs -o mode=1777,nosuid,nodev tmp /tmp
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip link set lo up
ip addr add "$OC_V4" dev eth0
ip addr add "$OC_V6" dev eth0
ip link set eth0 up
# Commands come in over a port that is never closed: it can be open only once. A shell that ends (when nobody is at the other
# end, after the machine was copied) is replaced.
until port=$(ls /sys/class/virtio-ports) && [ -c "/dev/$port" ]; do sleep 0.1; done
exec 3<>"/dev/$port"
echo '@@exit 0' >&3
while :; do sh <&3 >&3 2>&1; sleep 0.1; done
