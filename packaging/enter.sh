#!/bin/sh
# enter.sh ROOT SOURCE QEMU HEADER COMMAND...: run a command in another root, in namespaces.
#
# Programs for another processor run through qemu-user. binfmt_misc belongs to this user namespace, so
# nothing is registered on this machine (Linux 6.7 and newer). HEADER: the start of such programs.
set -eu
if [ -z "${ENTERED:-}" ]; then
    ENTERED=1 exec unshare --map-root-user --mount "$0" "$@"
fi
root=$1 source=$2 qemu=$3 header=$4
shift 4
if [ -n "$qemu" ]; then
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    mount -t binfmt_misc none "$root/mnt"
    printf %s ":qemu:M::$header:$mask:/usr/bin/qemu-$qemu-static:OCF" > "$root/mnt/register"
fi
for below in dev proc; do mount --rbind "/$below" "$root/$below"; done
mount --bind "$source" "$root/ttun"
exec env -i PATH=/usr/sbin:/usr/bin LC_ALL=C chroot "$root" "$@"
