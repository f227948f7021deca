#!/bin/sh
# Builds the module and tries it in a VM inside the VM: if it brings the kernel down, this job is there to tell.
#
#   nido run -T kvm-host --nested --memory 2G --copy examples/kernel-module:/src -- /src/test.sh
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
cp "$here/hello.c" "$here/Makefile" "$work"
cd "$work"
make --no-print-directory -C "/lib/modules/$(uname -r)/build" M="$work" modules

# An initramfs with one program in it.
mkdir -p root/bin
cp /bin/busybox root/bin/
cp hello.ko root/
cat > root/init <<'INIT'
#!/bin/busybox sh
/bin/busybox insmod /hello.ko && /bin/busybox rmmod hello
/bin/busybox dmesg | /bin/busybox grep hello:
/bin/busybox poweroff -f
INIT
chmod +x root/init
(cd root && find . | cpio --quiet -o -H newc) > initramfs

timeout 300 qemu-system-x86_64 -M q35 -accel kvm -cpu host -m 256M -nodefaults -display none -no-reboot -serial stdio \
    -kernel "/boot/vmlinuz-$(uname -r)" -initrd initramfs -append "console=ttyS0 quiet panic=-1" < /dev/null | tee log
grep -q 'hello: loaded' log && grep -q 'hello: gone' log
echo "the module was loaded and unloaded under KVM"
