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
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120)
    # The lists may be missing or name versions that are gone: the first try is quick, the second sure.
    as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { as_root "${apt[@]}" update >/dev/null 2>&1 &&
            as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1; }
}

# How long one command waits for another that sets up .venv.
SETUP_WAIT_S=900

# setup_venv EXTRAS: .venv with this project and EXTRAS (a,b), made, or brought up to date when pyproject.toml has changed or an
# extra is missing; what is there already is left alone, so that what runs from it goes on. Two commands at once wait for each other.
setup_venv() (
    exec 9<. # closed, and so unlocked, with this subshell
    flock -n 9 || { say "another command sets up .venv: waiting for it ..." && flock -w "$SETUP_WAIT_S" 9; } || {
        echo "another command has been setting up .venv for $SETUP_WAIT_S s: end it, then this again" >&2
        exit 1
    }
    python='' here='' extras=$1
    stamp=.venv/.ngpu-$(sha256sum <pyproject.toml | cut -c1-16)
    [[ ! -e $stamp ]] || here=$(<"$stamp")
    # The names of both, each once.
    extras=$(tr ',' '\n' <<<"$here,$extras" | sed '/^$/d' | sort -u | paste -sd ,)
    [[ $extras != "$here" ]] || exit 0
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || {
        echo "NGPU needs Python 3.11 or newer; on Debian or Ubuntu: apt-get install python3 python3-venv" >&2
        exit 1
    }
    if [[ ! -x .venv/bin/pip ]]; then
        say "making a virtualenv in .venv ..."
        "$python" -m venv .venv >/dev/null 2>&1 ||
            { install_packages python3-venv && "$python" -m venv .venv; } || {
            echo "cannot make a virtualenv: run 'apt-get install python3-venv' as root, then this again" >&2
            exit 1
        }
    fi
    say "installing the packages of NGPU [$extras] (a minute or two the first time) ..."
    rm -f .venv/.ngpu-*
    .venv/bin/pip -q --disable-pip-version-check install -e ".[$extras]" 2> >(grep -v '^WARNING: Location' >&2) || exit 1
    echo "$extras" >"$stamp"
)

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

# setup_postgres: a private PostgreSQL cluster of this run on a free port. Sets NGPU_TEST_POSTGRES_URL and POSTGRES_HOME; stop_postgres ends it.
setup_postgres() {
    local bin port user=()
    bin=$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
    [[ -n $bin ]] || return 1
    # initdb refuses root.
    ((EUID != 0)) || user=(runuser -u postgres --)
    POSTGRES_HOME=$("${user[@]}" mktemp -d /tmp/ngpu-postgres-XXXXXX) || return 1
    POSTGRES_STOP=("${user[@]}" "$bin/pg_ctl" -D "$POSTGRES_HOME/data" -m immediate stop)
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "${user[@]}" "$bin/initdb" -A trust -U ngpu -E UTF8 --no-locale -D "$POSTGRES_HOME/data" >/dev/null &&
        (cd / && "${user[@]}" "$bin/pg_ctl" -D "$POSTGRES_HOME/data" -l "$POSTGRES_HOME/log" -w -t 30 \
            -o "-p $port -k $POSTGRES_HOME -c listen_addresses=127.0.0.1" start >/dev/null) || return 1
    export NGPU_TEST_POSTGRES_URL=postgresql+psycopg://ngpu@127.0.0.1:$port/postgres
}

stop_postgres() {
    [[ -n ${POSTGRES_HOME:-} ]] || return 0
    "${POSTGRES_STOP[@]}" >/dev/null 2>&1 || true
    rm -rf "$POSTGRES_HOME"
}
