#!/usr/bin/env bash
# Runs the container tests against a real Docker engine: engine.sh [amd64|arm64].
#
# What is missing is installed from the distribution's packages, an engine is started unless one answers already, and the
# base image is made with debootstrap from the mirror this machine uses, so that no image registry is needed. arm64 runs
# under qemu. Afterwards nothing is left: no engine, mount, interpreter registration or image that was not there before.
#
#   DOCKER_HOST  an engine to use             BASE_IMAGE  a base image to use instead of making one
#   BASE_TAR     a file that keeps the base   PYTHON      the Python that has fmdeploy (default .venv/bin/python)
set -euo pipefail
ARCH=${1:-$(dpkg --print-architecture)}
PYTHON=${PYTHON:-.venv/bin/python}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/fmdeploy-engine.XXXXXX")
BINFMT=/proc/sys/fs/binfmt_misc
own_engine='' own_binfmt='' own_mount='' own_base=''

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'CONTAINER TESTS NOT RUN: %s\n' "$*" >&2
    exit 3
}

clean_up() {
    set +e
    [ -n "$own_base" ] && docker image rm --force "$own_base" > /dev/null 2>&1
    if [ -n "$own_engine" ] && [ -f "$WORK/pid" ]; then
        pid=$(cat "$WORK/pid")
        kill -TERM "$pid"
        for _ in $(seq 150); do [ -d "/proc/$pid" ] || break; sleep 0.2; done
    fi
    awk -v work="$WORK/" 'index($2, work) == 1 {print $2}' /proc/mounts | sort -r | xargs -r -n 1 umount -l
    [ -n "$own_binfmt" ] && echo -1 > "$BINFMT/qemu-aarch64"
    [ -n "$own_mount" ] && umount "$BINFMT"
    rm -rf "$WORK"
}
trap clean_up EXIT

install_missing() {
    local missing=()
    command -v docker > /dev/null && { answers || [ -x /usr/sbin/dockerd ]; } || missing+=(docker.io)
    [ -n "${BASE_IMAGE:-}" ] || [ -x /usr/sbin/debootstrap ] || missing+=(debootstrap)
    [ "$ARCH" = "$(dpkg --print-architecture)" ] || [ -x /usr/bin/qemu-aarch64-static ] || missing+=(qemu-user-static)
    [ ${#missing[@]} -eq 0 ] && return
    say "installing ${missing[*]}"
    [ "$(id -u)" = 0 ] || fail "${missing[*]} would have to be installed, which needs root"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends "${missing[@]}"; } > "$WORK/apt.log" 2>&1 ||
        { cat "$WORK/apt.log" >&2; fail "the packages ${missing[*]} could not be installed"; }
}

answers() { docker version > /dev/null 2>&1; }

start_engine() {
    answers && { say "using the engine that answers already"; return; }
    [ "$(id -u)" = 0 ] || fail "no Docker engine answers, and starting one needs root"
    export DOCKER_HOST="unix://$WORK/docker.sock"
    own_engine=yes
    # No bridge and no firewall rules: neither the build nor the container uses a network.
    /usr/sbin/dockerd --data-root "$WORK/data" --exec-root "$WORK/exec" --host "$DOCKER_HOST" --pidfile "$WORK/pid" \
        --iptables=false --ip6tables=false --bridge=none > "$WORK/dockerd.log" 2>&1 &
    for _ in $(seq 150); do
        answers && return
        sleep 0.2
    done
    tail -n 30 "$WORK/dockerd.log" >&2
    fail "the Docker engine does not start"
}

emulate() {
    [ "$ARCH" = "$(dpkg --print-architecture)" ] && return
    if ! [ -e "$BINFMT/register" ]; then
        mount -t binfmt_misc binfmt_misc "$BINFMT" || fail "binfmt_misc cannot be mounted"
        own_mount=yes
    fi
    if ! [ -e "$BINFMT/qemu-aarch64" ]; then
        cat /usr/lib/binfmt.d/qemu-aarch64.conf > "$BINFMT/register" || fail "qemu cannot be registered"
        own_binfmt=yes
    fi
}

make_base() {
    local suite mirror root="$WORK/root" tar=${BASE_TAR:-$WORK/base.tar}
    if ! [ -f "$tar" ]; then
        suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
        mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' | awk -v s="$suite" '$1 == s {print $2; exit}')
        [ -n "$mirror" ] || fail "apt has no repository of $suite"
        say "debootstrap $suite for $ARCH"
        debootstrap --arch "$ARCH" --variant minbase --include python3 "$suite" "$root" "$mirror" > "$WORK/base.log" 2>&1 ||
            { tail -n 20 "$WORK/base.log" >&2; fail "debootstrap failed"; }
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        tar --directory "$root" --numeric-owner --create --file "$tar.$$" . && mv "$tar.$$" "$tar"
        rm -rf "$root"
    fi
    BASE_IMAGE="fmdeploy-test-base:$ARCH-$$" own_base=$BASE_IMAGE
    "$PYTHON" tests/container/archive.py "$tar" "$ARCH" "$BASE_IMAGE" | docker load --quiet > /dev/null
}

install_missing
start_engine
emulate
[ -n "${BASE_IMAGE:-}" ] || make_base
docker version --format 'engine {{.Server.Version}}' >&2
say "base: $(docker run --rm --network none "$BASE_IMAGE" python3 -c 'import platform; print(platform.freedesktop_os_release()["PRETTY_NAME"], platform.machine(), "Python", platform.python_version())')"
FMDEPLOY_REQUIRE=container FMDEPLOY_BASE=$BASE_IMAGE FMDEPLOY_ARCH=$ARCH \
    "$PYTHON" -m pytest tests/container --numprocesses 0 --timeout 3000 --durations 10 -m container
