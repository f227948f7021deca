# The last touch to the root directory $1: the user, no identity, nothing that only took room.
set -eu
root=$1
chroot "$root" useradd --create-home --uid 1000 --user-group --shell "$NIDO_SHELL" "$NIDO_USER"
chroot "$root" usermod --shell "$NIDO_SHELL" root

# Identity is given by the agent at every boot; here it must be absent or generic.
rm -f "$root/etc/hostname" "$root/etc/hosts" "$root/etc/resolv.conf" "$root"/etc/ssh/ssh_host_*
echo vm >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\tvm\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"
: >"$root/etc/machine-id"
if [ -d "$root/var/lib/dbus" ]; then
    ln -sf /etc/machine-id "$root/var/lib/dbus/machine-id"
fi
rm -f "$root/var/lib/systemd/random-seed"
: >"$root/etc/fstab"
echo LANG=C.UTF-8 >"$root/etc/default/locale"

# How this host reaches its mirror is not the guest's business.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
# Skipping syncs is right for a build that fails as a whole, wrong for a guest.
sed -i /force-unsafe-io/d "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
rm -rf "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root/var/cache/ldconfig/aux-cache"
find "$root/var/log" -type f -delete
