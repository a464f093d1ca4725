"""Whether TensorRT can use the deep-learning accelerator: a matter of board and release."""

from __future__ import annotations

from fmdeploy.jetson.checks.finding import Diagnosis, Severity, Site, version_of
from fmdeploy.jetson.checks.software import tensorrt_version

LAST, AGAIN = (10, 7), (11, 4, 1)  # the last TensorRT 10 with DLA, and the one that has it again, on AGX Orin


def dla_support(board: str, l4t: str, tensorrt: str) -> tuple[bool, str]:
    """Return whether a board's TensorRT can use its DLA, and why not; the reason is empty where it can."""
    release, version = version_of(l4t), version_of(tensorrt)
    if "nano" in board.lower():
        return False, "an Orin Nano has no DLA"
    if version[:2] <= LAST:
        return (True, "") if release[0] in (35, 36) else (False, f"L4T {l4t} has no DLA driver for TensorRT {tensorrt}")
    if version < AGAIN:
        return False, f"TensorRT {tensorrt} has no DLA: 10.7 is the last with it, 11.4.1 the next"
    if "agx orin" in board.lower() and release >= (39, 2, 1):
        return True, ""
    return False, f"TensorRT {tensorrt} has DLA on AGX Orin with JetPack 7.2.2 or later only"


def dla(site: Site) -> list[Diagnosis]:
    """DLA: there or not; fmdeploy's tiers run on the GPU, so that neither is wrong."""
    if not site.jetson:
        return []
    found = tensorrt_version(site)
    if site.board is None or site.l4t is None or found is None:
        return [Diagnosis("dla", Severity.UNKNOWN, "board, release or TensorRT is unknown, so DLA is, too",
                          fix="Run the doctor on the host")]
    able, reason = dla_support(site.board, site.l4t, found[0])
    text = "TensorRT can use the DLA; fmdeploy's tiers run on the GPU" if able else f"no DLA: {reason}"
    return [Diagnosis("dla", Severity.OK, text, found=f"{site.board}, L4T {site.l4t}, TensorRT {found[0]}")]
