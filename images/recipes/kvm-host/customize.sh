# The kernel itself, beside its modules: what runs inside the guest may boot it again.
set -eu
root=$1
mkdir -p "$root/boot"
cp "$(dirname "$root")"/kernel/boot/vmlinuz-* "$root/boot/"
