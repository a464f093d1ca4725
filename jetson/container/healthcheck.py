"""The health check of the image: asks the server on its Unix socket whether it is ready. Standard library only.

`python3 -m fmdeploy.jetson.container.healthcheck [SOCKET]` exits 0 when /v2/health/ready answers 200, else 1.
"""

from __future__ import annotations

import http.client
import socket
import sys

SOCKET = "/run/fmdeploy/serve.sock"
TIMEOUT_S = 5.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self.path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def ready(path: str = SOCKET, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Whether the server at `path` is ready, and what it said."""
    connection = UnixConnection(path, timeout_s)
    try:
        connection.request("GET", "/v2/health/ready")
        answer = connection.getresponse()
        text = answer.read(2000).decode("utf-8", "replace").strip()
        return answer.status == 200, f"{answer.status} {text}".strip()
    except (OSError, http.client.HTTPException) as error:
        return False, f"{path}: {type(error).__name__}: {error}"
    finally:
        connection.close()


def main() -> int:
    """Print one line, return the exit code."""
    good, text = ready(sys.argv[1] if len(sys.argv) > 1 else SOCKET)
    print(text or "ready")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
