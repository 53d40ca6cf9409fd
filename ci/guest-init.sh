#!/bin/sh
# /init of the test guest: the least that gives a Linux with virtio disks, then the test's own script.
# busybox ash; packed by guest-assets.sh.
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp /mnt /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm

# In dependency order, as listed when the archive was made.
while read -r module; do
    insmod "/lib/modules/$module" || echo "cannot load $module"
done </lib/modules/order

# Appended to the archive by whoever starts the guest. Tests listen on a second serial port; a demo has none.
if [ -f /test.sh ]; then
    if sh -u /test.sh; then result=ok; else result="fail exit $?"; fi
    echo "RESULT script $result" 2>/dev/null >/dev/ttyS1
else
    echo "The disk is /dev/vda. 'poweroff -f' ends the guest."
    setsid cttyhack sh
fi
sync
poweroff -f
