#!/usr/bin/env bash
# Runs the container tests against a real Docker engine: engine.sh [amd64|arm64].
#
# What is missing is installed from the distribution's packages, an engine is started unless one answers already, and the
# base image is made with debootstrap from the mirror this machine uses, so that no image registry is needed. arm64 runs
# under qemu 10: in the 7.2 of Debian 12 `import onnxruntime` dies from 1.28 on. Where it is older, that of the backports
# is unpacked for the time of the run. Afterwards nothing is left but installed packages: no engine, mount, interpreter
# registration or image that was not there before.
#
#   DOCKER_HOST  an engine to use             BASE_IMAGE  a base image to use instead of making one
#   BASE_TAR     a file that keeps the base   PYTHON      the Python that has fmdeploy (default .venv/bin/python)
set -euo pipefail
ARCH=${1:-$(dpkg --print-architecture)}
PYTHON=${PYTHON:-.venv/bin/python}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/fmdeploy-engine.XXXXXX")
BINFMT=/proc/sys/fs/binfmt_misc
INTERPRETER=fmdeploy-aarch64-$$
QEMU_MAJOR=10
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
    [ -n "$own_binfmt" ] && echo -1 > "$BINFMT/$INTERPRETER"
    [ -n "$own_mount" ] && umount "$BINFMT"
    rm -rf "$WORK"
}
trap clean_up EXIT

install_missing() {
    local missing=()
    command -v docker > /dev/null && { answers || [ -x /usr/sbin/dockerd ]; } || missing+=(docker.io)
    [ -n "${BASE_IMAGE:-}" ] || [ -x /usr/sbin/debootstrap ] || missing+=(debootstrap)
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
    [ "$ARCH" = arm64 ] || fail "no emulator is known for $ARCH"
    [ "$(id -u)" = 0 ] || fail "registering an emulator needs root"
    local qemu found='' magic='\x7f\x45\x4c\x46\x02\x01\x01' mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff'
    for qemu in /usr/bin/qemu-aarch64-static /usr/bin/qemu-aarch64; do
        if [ -z "$found" ] && [ "$(major "$qemu")" -ge "$QEMU_MAJOR" ]; then found=$qemu; fi
    done
    if [ -z "$found" ]; then
        fetch_qemu
        found=$WORK/qemu/usr/bin/qemu-aarch64
        [ "$(major "$found")" -ge "$QEMU_MAJOR" ] || fail "the backports have no qemu $QEMU_MAJOR either"
    fi
    if ! [ -e "$BINFMT/register" ]; then
        mount -t binfmt_misc binfmt_misc "$BINFMT" || fail "binfmt_misc cannot be mounted"
        own_mount=yes
    fi
    # The kernel asks the latest registration first, and (F) opens the program now, so that containers need not hold it.
    magic+='\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00' mask+='\xfe\xff\xff\xff'
    echo ":$INTERPRETER:M::$magic:$mask:$found:POCF" > "$BINFMT/register" || fail "qemu cannot be registered"
    own_binfmt=yes
    say "$("$found" --version | head -n 1)"
}

major() { { "$1" --version 2> /dev/null || echo version 0; } | sed -n '1s/.*version \([0-9]*\).*/\1/p'; }

fetch_qemu() {
    local suite mirror private keys=/usr/share/keyrings/debian-archive-keyring.gpg
    read -r suite mirror < <(repository) || fail "apt has no repository of this release"
    say "qemu from $suite-backports"
    mkdir -p "$WORK"/apt/lists/partial "$WORK"/apt/archives/partial
    [ -f "$keys" ] && keys="[signed-by=$keys] " || keys=''
    printf 'deb %s%s %s main\n' "$keys" "$mirror" "$suite" "$keys" "$mirror" "$suite-backports" > "$WORK/apt/sources.list"
    # apt with sources and lists of its own: what this machine would install stays as it is.
    private=(-qq -o "Dir::Etc::sourcelist=$WORK/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
             -o "Dir::State::lists=$WORK/apt/lists" -o "Dir::Cache=$WORK/apt" -o APT::Sandbox::User=root)
    (cd "$WORK/apt" && apt-get "${private[@]}" update &&
        apt-get "${private[@]}" --target-release "$suite-backports" download qemu-user &&
        dpkg-deb --extract qemu-user_*.deb "$WORK/qemu") > "$WORK/apt.log" 2>&1 ||
        { cat "$WORK/apt.log" >&2; fail "qemu could not be fetched"; }
}

repository() {
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v s="$(. /etc/os-release && echo "$VERSION_CODENAME")" '$1 == s {print; exit}'
}

make_base() {
    local suite mirror root="$WORK/root" tar=${BASE_TAR:-$WORK/base.tar}
    if ! [ -f "$tar" ]; then
        read -r suite mirror < <(repository) || fail "apt has no repository of this release"
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
