#!/bin/sh
# Becomes one container: its own mounts, root directory and user; then runs the command as
# process 1. Started in namespaces of its own by tests/pods.py, which wrote all of PLACE/*.
# The root directory is read-only and holds the system's programs, Python and this source tree.
set -eu
place=$1 user=$2 readonly_paths=$3
root=$place/root
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=1m root "$root"
for path in /bin /sbin /lib /lib64 /usr; do
    [ -e $path ] || continue
    if [ -L $path ]; then cp -P $path "$root$path"; continue; fi
    mkdir "$root$path"
    mount --bind $path "$root$path"
    mount -o remount,bind,ro "$root$path"
done
mkdir "$root/etc" "$root/dev" "$root/proc"
for file in passwd group nsswitch.conf ld.so.cache; do cp /etc/$file "$root/etc/$file"; done
for file in hosts resolv.conf; do
    : > "$root/etc/$file"
    mount --bind "$place/$file" "$root/etc/$file"
done
for device in null zero full random urandom; do
    : > "$root/dev/$device"
    mount --bind /dev/$device "$root/dev/$device"
done
mount -t proc proc "$root/proc"
for path in $readonly_paths; do
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
# Each line: where, then what: a directory, or the size of a tmpfs.
while read -r where mode what; do
    mkdir -p "$root$where"
    case $mode in
    memory) mount -t tmpfs -o "size=$what,mode=1777" memory "$root$where" ;;
    rw) mount --bind "$what" "$root$where" ;;
    ro) mount --bind "$what" "$root$where"; mount -o remount,bind,ro "$root$where" ;;
    esac
done < "$place/mounts"
mount -o remount,ro "$root"
hostname "$(cat "$place/hostname")"
shift 3
exec chroot "$root" setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs \
    --bounding-set -all --inh-caps -all "$@"
