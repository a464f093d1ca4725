"""Which blocks are run under activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint

from fmdeploy.models import recompute


def watch_recomputing(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The blocks that are from now on, one after another."""
    ran: list[nn.Module] = []

    def spied(block: nn.Module, *inputs: Any, **options: Any) -> Any:
        ran.append(block)
        return checkpoint(block, *inputs, **options)

    monkeypatch.setattr(recompute, "checkpoint", spied)
    return ran
