#!/bin/sh
# Init of the test guest. Writes self-describing 4 KiB blocks to the data partition, flushes each,
# and only then says so on the serial console; then reads everything back past the cache.
# The host says what to do in the SMBIOS serial number: "write:FIRST:COUNT" (power off at the end),
# "endless:FIRST" (until killed) or "verify:FIRST:COUNT" (read back what an earlier boot wrote).
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    insmod /modules/$module.ko
done
tries=0
while [ ! -b /dev/vda2 ] && [ $tries -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done

finish() {
    echo "GUEST $1"
    sync
    poweroff -f
}

slots=$(($(cat /sys/class/block/vda2/size) / 8))

# A block: one line "csvfs-guest SEQUENCE SLOT", 512 bytes, eight times.
block() {
    line=$(printf 'csvfs-guest %010d %010d' "$1" "$2")
    printf '%-511s\n%-511s\n%-511s\n%-511s\n%-511s\n%-511s\n%-511s\n%-511s\n' \
        "$line" "$line" "$line" "$line" "$line" "$line" "$line" "$line"
}

# Each sequence number has one slot of its own, scattered over the partition.
slot_of() {
    echo $((($1 * 7919 + 17) % slots))
}

write_one() {
    slot=$(slot_of "$1")
    block "$1" "$slot" >/tmp/block
    dd if=/tmp/block of=/dev/vda2 bs=4096 seek="$slot" count=1 conv=notrunc,fsync 2>/dev/null || finish "WRITE-ERROR $1"
    echo "ACK $1 $slot"
}

verify_range() {
    echo 3 >/proc/sys/vm/drop_caches
    sequence=$1
    bad=0
    while [ "$sequence" -lt $(($1 + $2)) ]; do
        slot=$(slot_of "$sequence")
        block "$sequence" "$slot" >/tmp/expected
        dd if=/dev/vda2 of=/tmp/found bs=4096 skip="$slot" count=1 2>/dev/null || finish "READ-ERROR $sequence"
        cmp -s /tmp/expected /tmp/found || { echo "BAD $sequence $slot"; bad=$((bad + 1)); }
        sequence=$((sequence + 1))
    done
    echo "VERIFIED $2 BAD $bad"
}

order=$(cat /sys/class/dmi/id/product_serial)
mode=${order%%:*}
rest=${order#*:}
first=${rest%%:*}
count=${rest#*:}
echo "GUEST UP $order"
case $mode in
write)
    sequence=$first
    while [ "$sequence" -lt $((first + count)) ]; do
        write_one "$sequence"
        sequence=$((sequence + 1))
    done
    verify_range "$first" "$count"
    finish DONE
    ;;
endless)
    sequence=$first
    while :; do
        write_one "$sequence"
        sequence=$((sequence + 1))
    done
    ;;
verify)
    verify_range "$first" "$count"
    finish DONE
    ;;
*)
    finish "UNKNOWN-ORDER $order"
    ;;
esac
