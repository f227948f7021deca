# Copies the recipe's own files over the root directory $1.
set -eu
cp -r --preserve=mode "$(dirname "$1")/files/." "$1/"
