"""What a client did, or asked for at a bad moment: a status, one line, and reason codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmdeploy.runtime.frame import Reason


class RequestError(Exception):
    """The answer is an error.

    Attributes:
        status: HTTP status.
        text: One line for the client.
        reasons: Reason codes.
        facts: More members of the error body.
    """

    def __init__(
        self, status: int, text: str, *, reasons: tuple[Reason, ...] = (), facts: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.reasons, self.facts = status, text, reasons, dict(facts or {})


def not_ready(text: str) -> RequestError:
    """The model cannot run now."""
    return RequestError(503, text, reasons=(Reason.NOT_READY,))
