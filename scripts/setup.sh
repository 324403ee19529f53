# shellcheck shell=bash disable=SC2034
# Sourced by the other commands: what a fresh Debian or Ubuntu machine needs before they can run. Says what it does, on stderr.

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }

# as_root CMD...: runs it as root where that is possible without asking for a password.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# install_packages NAME...: Debian packages, if they are missing and this machine lets us.
install_packages() {
    local missing=() name
    for name in "$@"; do
        [[ $(dpkg-query -W -f '${Status}' "$name" 2>/dev/null) == *' installed' ]] || missing+=("$name")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || return 1
    say "installing ${missing[*]} ..."
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq)
    # The lists may be missing or name versions that are gone: the first try is quick, the second sure.
    as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { as_root "${apt[@]}" update >/dev/null 2>&1 &&
            as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1; }
}

# setup_venv EXTRAS: .venv with this project and EXTRAS, made or brought up to date when pyproject.toml has changed.
setup_venv() {
    local extras=$1 python='' candidate stamp
    stamp=.venv/.ngpu-$(cat pyproject.toml <(echo "$extras") | sha256sum | cut -c1-16)
    [[ -e $stamp ]] && return 0
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || {
        echo "NGPU needs Python 3.11 or newer; on Debian or Ubuntu: apt-get install python3 python3-venv" >&2
        return 1
    }
    if [[ ! -x .venv/bin/pip ]]; then
        say "making a virtualenv in .venv ..."
        "$python" -m venv .venv >/dev/null 2>&1 ||
            { install_packages python3-venv && "$python" -m venv .venv; } || {
            echo "cannot make a virtualenv: run 'apt-get install python3-venv' as root, then this again" >&2
            return 1
        }
    fi
    say "installing the packages of NGPU [$extras] (a minute or two the first time) ..."
    .venv/bin/pip -q --disable-pip-version-check install -e ".[$extras]" 2> >(grep -v '^WARNING: Location' >&2)
    touch "$stamp"
}

# setup_docker: a Docker engine that answers; installs and starts one where it may. Sets DOCKERD_PID if it started one.
# Returns 1 with the reason in DOCKER_REASON.
setup_docker() {
    DOCKERD_PID=
    DOCKER_REASON=
    docker info >/dev/null 2>&1 && return 0
    if [[ -n ${DOCKER_HOST:-} ]]; then
        DOCKER_REASON="the engine at DOCKER_HOST=$DOCKER_HOST does not answer"
        return 1
    fi
    if ! command -v dockerd >/dev/null; then
        install_packages docker.io iptables || true
        command -v dockerd >/dev/null || {
            DOCKER_REASON="there is no Docker engine, and it could not be installed (needs root and apt-get)"
            return 1
        }
        docker info >/dev/null 2>&1 && return 0
    fi
    if [[ -d /run/systemd/system ]]; then
        as_root systemctl start docker >/dev/null 2>&1 || true
        docker info >/dev/null 2>&1 && return 0
    fi
    if ((EUID != 0)); then
        DOCKER_REASON="the Docker engine does not answer to this user (add it to the group docker, or run as root)"
        return 1
    fi
    command -v iptables >/dev/null || install_packages iptables || true
    say "starting a Docker engine ..."
    local log=${TMPDIR:-/tmp}/ngpu-dockerd.log
    setsid nohup dockerd >"$log" 2>&1 </dev/null &
    DOCKERD_PID=$!
    local tries
    for ((tries = 0; tries < 60; tries++)); do
        docker info >/dev/null 2>&1 && return 0
        kill -0 "$DOCKERD_PID" 2>/dev/null || break
        sleep 0.5
    done
    kill "$DOCKERD_PID" 2>/dev/null || true
    DOCKERD_PID=
    DOCKER_REASON="a Docker engine was started but did not come up: see $log"
    return 1
}
