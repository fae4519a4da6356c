#!/bin/sh
# Runs a command in a root of make_root.sh, under QEMU and without a network: enter.sh ROOT [FOLDER=PLACE ...] -- COMMAND
# Each FOLDER of this machine is PLACE there. All mounts, and who runs programs for arm64, end with the command.
set -eu
if [ "${1-}" != inside ]; then
    exec unshare --user --map-root-user --mount --net --pid --fork --kill-child -- "$0" inside "$@"
fi
root=$2
shift 2
mount -t proc proc "$root/proc"
mount --bind "$root/etc/cpuinfo" "$root/proc/cpuinfo"
while [ "$1" != -- ]; do
    mkdir -p -- "$root/${1#*=}"
    mount --bind "${1%%=*}" "$root/${1#*=}"
    shift
done
shift
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
# An ELF file for AArch64 starts with these bytes. F: the interpreter is opened now, where its path is known.
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf '%s' ":kvslim-arm64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" > /proc/sys/fs/binfmt_misc/register
# SVE is switched off: a Cortex-A76 has none, and emulating it is slow.
exec env -i QEMU_CPU=max,sve=off PATH=/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 HOME=/root chroot "$root" "$@"
