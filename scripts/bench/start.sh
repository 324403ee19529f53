# shellcheck shell=bash
# Sourced by the commands beside it: the machine set up, then the module of that name.

# start NAME PACKAGES ARGUMENTS: with the Debian packages named in one word.
start() {
    local name=$1 packages
    read -ra packages <<<"$2"
    shift 2
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || return 1
    # shellcheck source=scripts/setup.sh
    source scripts/setup.sh
    if [[ " $* " != *" -h "* && " $* " != *" --help "* ]] && ((${#packages[@]})); then
        install_packages "${packages[@]}" || {
            echo "$name: needs the Debian packages ${packages[*]}" >&2
            return 1
        }
    fi
    setup_venv postgres || return 1
    exec .venv/bin/python -m "scripts.bench.$name" "$@"
}
