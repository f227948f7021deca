# Makes the kernel of the source package in the directory $NIDO_OUT, with the options in its file `config`; leaves `vmlinux`,
# `release` and `configured` there. It runs in a mount namespace of its own and works in /mnt: a kernel cannot be made below
# a path with blanks or colons, and what is made must not depend on the path. Where there is memory enough, /mnt is memory:
# then its ten thousands of files are gone at once, however this ends. It says the name of each step.
set -eu
cd "$NIDO_OUT"
if [ "$NIDO_IN_MEMORY" = yes ]; then
    mount -t tmpfs -o mode=0700,size=2g kernel /mnt
else
    mkdir work
    mount --bind work /mnt
fi
mkdir /mnt/linux /mnt/tmp
export TMPDIR=/mnt/tmp

echo "--- unpack the kernel's source"
dpkg-deb --extract ./*.deb deb
rm ./*.deb
# Half of the source is for other architectures and for hardware no guest has. Its makefiles and Kconfig files stay.
for part in 'Documentation/*/*' 'arch/[!x]*/*.dts*' 'arch/[!x]*/*.[chS]' 'drivers/gpu/*.[ch]' 'drivers/iio/*.[ch]' \
    'drivers/infiniband/*.[ch]' 'drivers/media/*.[ch]' 'drivers/net/ethernet/*.[ch]' 'drivers/net/wireless/*.[ch]' \
    'drivers/scsi/*.[ch]' 'drivers/staging/*.[ch]' 'drivers/usb/*.[ch]' 'samples/*.[chS]' 'sound/*.[ch]' \
    'tools/perf/*' 'tools/testing/*'; do
    echo "linux-source-*/$part"
done >leave-out
tar --extract --xz --file deb/usr/src/linux-source-*.tar.xz --directory /mnt/linux --strip-components=1 --no-same-owner \
    --exclude-from=leave-out
rm -r deb

echo "--- configure the kernel"
cp config /mnt/config
make -C /mnt/linux KCONFIG_ALLCONFIG=/mnt/config allnoconfig
cp /mnt/linux/.config configured
# Whatever the source does not know, or ties to something else, would be dropped in silence.
lost=$(grep '^CONFIG_' config | grep -vxF -f configured || true)
if [ -n "$lost" ]; then
    echo "E: the kernel's source does not take these options:" $lost >&2
    exit 1
fi

echo "--- compile the kernel"
# Neither this host nor this moment goes into the kernel.
make -C /mnt/linux -j"$NIDO_CPUS" KBUILD_BUILD_USER=nido KBUILD_BUILD_HOST=nido \
    KBUILD_BUILD_TIMESTAMP="$(date -u -r /mnt/linux/Makefile)" vmlinux
cp /mnt/linux/include/config/kernel.release release
objcopy --strip-all /mnt/linux/vmlinux vmlinux
