# systemd as a guest wants it: the agent enabled, and nothing started that a VM with one disk and no screen has no use for.
set -eu
root=$1
chroot "$root" systemctl enable nido-guest-agent.service
chroot "$root" systemctl set-default multi-user.target
chroot "$root" systemctl mask \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    console-getty.service getty@tty1.service serial-getty@ttyS0.service getty-static.service \
    dev-hugepages.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    modprobe@.service systemd-modules-load.service systemd-remount-fs.service systemd-journal-flush.service \
    proc-sys-fs-binfmt_misc.automount systemd-ask-password-console.path systemd-ask-password-wall.path \
    systemd-binfmt.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    ldconfig.service systemd-firstboot.service systemd-hwdb-update.service systemd-journal-catalog-update.service \
    systemd-network-generator.service systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pstore.service \
    systemd-random-seed.service systemd-update-done.service
# The agent speaks for the user; inside, that user is an administrator.
echo "$NIDO_USER ALL=(ALL:ALL) NOPASSWD: ALL" >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
rm -rf "$root/var/log/journal"
# Tells systemd that /etc and /var are as new as /usr, so that no boot goes through the first-boot services.
touch -r "$root/usr" "$root/etc/.updated" "$root/var/.updated"
