"""The batch normalisation of several processes, in a group of one: it must be the ordinary one, statistics included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fmdeploy.training.shared_norm import SharedBatchNorm2d, keeps_own_buffers


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group that this process has for itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("options", [
    {}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 0.7}, {"track_running_stats": False}, {"affine": False},
])
def test_shared_statistics_are_those_of_batch_norm(options: dict[str, float | None]) -> None:
    ours, theirs = SharedBatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)  # type: ignore[arg-type]
    for batch in torch.randn(4, 6, 3, 5, 5) * torch.tensor([1.0, 3.0, 0.2])[:, None, None] + 2:
        x_BCHW, y_BCHW = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        found, wanted = ours(x_BCHW), theirs(y_BCHW)
        torch.testing.assert_close(found, wanted)
        found.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(x_BCHW.grad, y_BCHW.grad, rtol=1e-3, atol=1e-4)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)


class Counting(nn.Module):
    """Somebody's module that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


@pytest.mark.parametrize(("module", "own"), [
    (nn.BatchNorm2d(3), False), (SharedBatchNorm2d(3), False), (nn.GroupNorm(1, 3), False),
    (nn.BatchNorm1d(3), True), (nn.BatchNorm1d(3, track_running_stats=False), False), (Counting(), True),
])
def test_buffers_that_processes_may_not_share_are_noticed(module: nn.Module, own: bool) -> None:
    assert keeps_own_buffers(nn.Sequential(nn.Linear(3, 3), module)) is own
