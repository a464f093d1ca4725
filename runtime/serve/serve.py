"""`fmdeploy serve`: a bundle over HTTP, as KServe v2 says."""

from __future__ import annotations

from fmdeploy.command import Outcome, command
from fmdeploy.runtime.serve.config import ServeConfig
from fmdeploy.runtime.serve.process import serve_until_stopped


@command(ServeConfig)
def serve(config: ServeConfig) -> Outcome:
    """Serve a bundle over HTTP (KServe v2, Prometheus metrics) until SIGTERM; SIGHUP loads what is at BUNDLE now.

    When it is ready it prints one JSON line with model, address, tier and pid. Without --http and --unix it listens
    on 127.0.0.1:8000.
    """
    serve_until_stopped(config)
    return Outcome(data=None)
