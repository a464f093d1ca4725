"""Sockets to listen on: free ones, out of reach of others unless that was asked for, and never stolen."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fmdeploy.errors import ConfigError, InputError

BACKLOG = 128
UNIX_UMASK = 0o117  # leaves 0660: the owner and the group may connect
IN_USE = "is in use by another server"


class Listener(NamedTuple):
    """A bound and listening socket.

    Attributes:
        socket: The socket.
        address: What clients are told: `127.0.0.1:8000`, or the path of a Unix socket.
        unix: That path and its (device, inode); None for TCP.
    """

    socket: socket.socket
    address: str
    unix: tuple[Path, tuple[int, int]] | None

    def remove(self) -> None:
        """Remove the Unix socket's file, if it is still this one."""
        if self.unix is not None:
            with suppress(OSError):
                path, identity = self.unix
                if _identity(path) == identity:
                    path.unlink()


def listen(http: str, unix: Path | None, *, allow_remote: bool) -> Listener:
    """Bind and listen.

    Raises:
        ConfigError: The address is no address, or reaches other machines without leave.
        InputError: It is in use, or cannot be had.
    """
    if unix is not None:
        if http:
            raise ConfigError("--http and --unix are two places to listen", fix="Give one of them")
        return _listen_unix(Path(unix).absolute())
    return _listen_tcp(*parse_address(http), allow_remote=allow_remote)


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT or [HOST]:PORT.

    Raises:
        ConfigError: It is neither.
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError("is no address", where=text, expected="HOST:PORT such as 127.0.0.1:8000")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _listen_tcp(host: str, port: int, *, allow_remote: bool) -> Listener:
    if not allow_remote and not is_loopback(host):
        raise _remote(host)
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen: {getattr(error, 'strerror', None) or error}", where=where) from error
    if not allow_remote and not is_loopback(str(target[0])):  # whatever a file or a name server says of "localhost"
        server.close()
        raise _remote(f"{host}, which is {target[0]}")
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(target)
        server.listen(BACKLOG)
    except OSError as error:
        server.close()
        raise _refusal(error, where) from error
    found = server.getsockname()
    return Listener(server, f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}", None)


def _remote(host: str) -> ConfigError:
    return ConfigError("other machines can reach this address, and the server knows no users", where=host,
                       fix="Use 127.0.0.1 or --unix, or --allow-remote behind a firewall")


def _listen_unix(path: Path) -> Listener:
    """Bind below a lock on the folder: two servers that start at once must not both see a stale socket."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot listen: {error.strerror}", where=path.parent, fix="Make the folder first") from error
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(UNIX_UMASK)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _clear(path)
        server.bind(str(path))
        server.listen(BACKLOG)
        return Listener(server, str(path), (path, _identity(path)))
    except OSError as error:
        server.close()
        raise _refusal(error, str(path)) from error
    except InputError:
        server.close()
        raise
    finally:
        os.umask(before)
        os.close(folder)


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens to; refuse anything else that is there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError("is there already and is no socket", where=path, fix="Choose another path, or move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:  # a full backlog, or no permission: somebody may well be there
            pass
    raise InputError(IN_USE, where=path, fix="Stop that server, or choose another path")


def _refusal(error: OSError, where: str) -> InputError:
    if error.errno == errno.EADDRINUSE:
        return InputError(IN_USE, where=where, fix="Stop that server, or choose another port; port 0 takes a free one")
    return InputError(f"cannot listen: {error.strerror or error}", where=where)


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
