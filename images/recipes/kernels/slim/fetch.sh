# Downloads the package $NIDO_SOURCE into the directory $NIDO_OUT and writes its version beside it, unless a kernel made of
# that version is kept already. Nothing is installed. $1, an empty root directory, is not used.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
version=$(apt-cache show --no-all-versions "$NIDO_SOURCE" | sed -n 's/^Version: //p')
if [ -z "$version" ]; then
    echo "E: the mirror has no package $NIDO_SOURCE" >&2
    exit 1
fi
echo "$version" >"$NIDO_OUT/version"
if [ ! -e "$NIDO_KEPT/slim-$version-$NIDO_TAG" ]; then
    cd "$NIDO_OUT"
    apt-get download "$NIDO_SOURCE=$version"
fi
