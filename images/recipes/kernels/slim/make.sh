# One step ($1) of making the kernel in the directory $NIDO_OUT. It runs in a mount namespace of its own, where that directory
# is /mnt: a kernel cannot be made below a path with blanks or colons, and what is made must not depend on the path.
set -eu
mount --bind "$NIDO_OUT" /mnt
cd /mnt
export TMPDIR=/mnt/tmp
case $1 in
unpack)
    mkdir tmp linux deb
    dpkg-deb --extract ./*.deb deb
    rm ./*.deb
    # Half of the source is for other architectures and for hardware no guest has. Its makefiles and Kconfig files stay.
    for part in 'Documentation/*/*' 'arch/[!x]*/*.dts*' 'arch/[!x]*/*.[chS]' 'drivers/gpu/*.[ch]' 'drivers/iio/*.[ch]' \
        'drivers/infiniband/*.[ch]' 'drivers/media/*.[ch]' 'drivers/net/ethernet/*.[ch]' 'drivers/net/wireless/*.[ch]' \
        'drivers/scsi/*.[ch]' 'drivers/staging/*.[ch]' 'drivers/usb/*.[ch]' 'samples/*.[chS]' 'sound/*.[ch]' \
        'tools/perf/*' 'tools/testing/*'; do
        echo "linux-source-*/$part"
    done >leave-out
    tar --extract --xz --file deb/usr/src/linux-source-*.tar.xz --directory linux --strip-components=1 --no-same-owner \
        --exclude-from=leave-out
    rm -r deb
    ;;
configure)
    make -C linux KCONFIG_ALLCONFIG=/mnt/config allnoconfig
    mv config wanted
    cp linux/.config config
    ;;
compile)
    # Neither this host nor this moment is in the kernel: the same source gives the same bytes.
    make -C linux -j"$NIDO_CPUS" KBUILD_BUILD_USER=nido KBUILD_BUILD_HOST=nido \
        KBUILD_BUILD_TIMESTAMP="$(date -u -r linux/Makefile)" vmlinux
    cp linux/include/config/kernel.release release
    objcopy --strip-all linux/vmlinux vmlinux
    rm -r linux tmp
    ;;
esac
