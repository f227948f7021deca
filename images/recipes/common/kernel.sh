# Downloads the newest kernel image the package $NIDO_KERNEL depends on and unpacks it beside the root directory $1.
# It is never installed: only its modules go into the root, so that modprobe works in the guest.
set -eu
root=$1
scratch=$(dirname "$root")
package=$(APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-cache depends "$NIDO_KERNEL" |
    sed -n 's/^ *Depends: \(linux-image-[^ ]*-cloud-amd64\)$/\1/p' | head -n 1)
if [ -z "$package" ]; then
    echo "E: the package $NIDO_KERNEL names no kernel image; are security updates among the sources?" >&2
    exit 1
fi
mkdir "$scratch/deb"
cd "$scratch/deb"
APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get download "$package"
dpkg-deb --extract ./*.deb "$scratch/kernel"
cd "$scratch"
rm -r "$scratch/deb"
version=$(ls "$scratch/kernel/lib/modules")
mkdir -p "$root/usr/lib/modules"
mv "$scratch/kernel/lib/modules/$version" "$root/usr/lib/modules/$version"
chroot "$root" depmod "$version"
