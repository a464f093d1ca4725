"""compose.yaml and systemd units, from the same options that `container run` gives to the engine.

Every value is a plain field (`fmdeploy.plainfield`), so nothing in these files needs quoting; values are checked here
again, because a renderer that trusts its caller is how a newline becomes a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fmdeploy.jetson.container.options import ENGINES, SECOND_NS, SOCKET, Settings
from fmdeploy.plainfield import plain_field

SAME_KEYS = ("image", "command", "user", "group_add", "read_only", "cap_drop", "security_opt", "network_mode",
             "pids_limit", "shm_size", "environment", "stop_signal", "runtime")
SANDBOX = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
PrivateTmp=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0027
"""


def checked(value: Any, where: str) -> Any:
    """`value`, all text in it plain.

    Raises:
        InputError: some of it is not.
    """
    if isinstance(value, str):
        return plain_field(value, where=where)
    if isinstance(value, dict):
        return {plain_field(key, where=where): checked(item, f"{where}.{key}") for key, item in value.items()}
    return [checked(item, where) for item in value] if isinstance(value, list) else value


def compose(options: dict[str, Any]) -> str:
    """compose.yaml: one service. Values are written as JSON, which YAML contains."""
    options = checked(options, "compose.yaml")
    health = {key: f"{value // SECOND_NS}s" if key in ("interval", "timeout", "start_period") else value
              for key, value in options["healthcheck"].items()}
    policy = options["restart_policy"]
    service = {"container_name": options["name"], **{key: options[key] for key in SAME_KEYS if key in options},
               "tmpfs": [f"{path}:{flags}" for path, flags in options["tmpfs"].items()], "volumes": options["mounts"],
               "healthcheck": health, "restart": f"{policy['Name']}:{policy['MaximumRetryCount']}"}
    lines = ["services:", f"  {options['name']}:"]
    lines += [f"    {key}: {json.dumps(value)}" for key, value in service.items()]
    if names := [mount["source"] for mount in options["mounts"] if mount["type"] == "volume"]:
        lines += ["volumes:", *(f"  {name}: {{name: {json.dumps(name)}}}" for name in names)]
    return "\n".join(lines) + "\n"


def docker_arguments(options: dict[str, Any]) -> Iterator[str]:
    """The same as arguments of `docker run`; the unit restarts it, so no restart policy."""
    options = checked(options, "docker run")
    yield from ("--rm", f"--name={options['name']}", f"--user={options['user']}", "--read-only", "--cap-drop=ALL")
    yield from (f"--group-add={group}" for group in options["group_add"])
    yield from (f"--security-opt={text}" for text in options["security_opt"])
    yield from (f"--network={options['network_mode']}", f"--pids-limit={options['pids_limit']}")
    yield f"--shm-size={options['shm_size']}"
    yield from (f"--tmpfs={path}:{flags}" for path, flags in options["tmpfs"].items())
    for mount in options["mounts"]:
        flag = ",readonly" if mount["read_only"] else ""
        yield f"--mount=type={mount['type']},source={mount['source']},target={mount['target']}{flag}"
    yield from (f"--env={key}={value}" for key, value in options["environment"].items())
    if "runtime" in options:
        yield f"--runtime={options['runtime']}"
    yield from (options["image"], *options["command"])


def container_unit(settings: Settings, options: dict[str, Any]) -> str:
    """A unit that keeps the container running. The socket's folder is made at every start, because /run is volatile."""
    uid, gid = plain_field(settings.user, where="--user").split(":")
    sockets, name = (plain_field(text, where="unit") for text in (settings.sockets, settings.name))
    arguments = " \\\n    ".join(docker_arguments(options))
    return f"""\
[Unit]
Description=fmdeploy runtime in a container
Requires=docker.service
After=docker.service
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=exec
ExecStartPre=-/usr/bin/docker rm --force {name}
ExecStartPre=/usr/bin/install -d -o {uid} -g {gid} -m 0750 {sockets}
ExecStart=/usr/bin/docker run {arguments}
ExecStop=/usr/bin/docker stop -t 15 {name}
TimeoutStopSec=30
Restart=on-failure
RestartSec=1
# Bad input and missing parts do not get better by starting again.
RestartPreventExitStatus=2 3

[Install]
WantedBy=multi-user.target
"""


def process_unit(settings: Settings, program: str) -> str:
    """A unit that runs the program itself, without a container, under systemd's watchdog and sandbox."""
    bundle = plain_field(str(settings.bundle.absolute()), where="bundle")
    named = f" --name {plain_field(settings.model, where='--model')}" if settings.model else ""
    key = plain_field(str(settings.key.absolute()), where="--key") if settings.key else ""
    signed = f" --require-signature {key}" if key else ""
    command = f"{plain_field(program, where='--program')} serve {bundle} --unix {SOCKET} --engines {ENGINES}"
    return f"""\
[Unit]
Description=fmdeploy runtime
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}{named}{signed}
# The runtime tells the watchdog of finished frames, not of time that passes.
WatchdogSec=10
TimeoutStartSec={settings.start_s}
TimeoutStopSec=30
KillMode=mixed
Restart=on-failure
RestartSec=1
# Bad input and missing parts do not get better by starting again.
RestartPreventExitStatus=2 3
DynamicUser=yes
SupplementaryGroups=video render
RuntimeDirectory=fmdeploy
RuntimeDirectoryMode=0750
StateDirectory=fmdeploy/engines
StateDirectoryMode=0750
Environment=HOME=/tmp ORT_DISABLE_TELEMETRY=1
TasksMax={settings.pids}
{SANDBOX}
[Install]
WantedBy=multi-user.target
"""
