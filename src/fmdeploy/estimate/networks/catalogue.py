"""The described networks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from fmdeploy.errors import ConfigError
from fmdeploy.estimate.networks.centerpoint import centerpoint_head
from fmdeploy.estimate.networks.mobilenet import mobilenet_v2
from fmdeploy.estimate.networks.resnet import resnet
from fmdeploy.estimate.networks.sketch import Sketch
from fmdeploy.estimate.networks.unet import unet
from fmdeploy.estimate.networks.vit import vit
from fmdeploy.estimate.networks.yolo import yolo11, yolov5s, yolov8n

NETWORKS: dict[str, Callable[[], Sketch]] = {
    **{f"resnet{depth}-224": partial(resnet, depth) for depth in (18, 34, 50)},
    **{f"vit_{kind}-224": partial(vit, kind) for kind in ("tiny", "small", "base")},
    **{f"yolo11{scale}-640": partial(yolo11, scale) for scale in "nsmlx"},
    "yolov8n-640": yolov8n,
    "yolov5s-672": partial(yolov5s, 672),
    "centerpoint-head": centerpoint_head,
    "mobilenet_v2-224": mobilenet_v2,
    "unet-128": unet,
}


def network(name: str) -> Sketch:
    """The description called `name`, such as "resnet50-224".

    Raises:
        ConfigError: there is none; near names are listed.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=3)
        raise ConfigError(f"no network is called {name!r}", expected=" | ".join(near or NETWORKS))
    return NETWORKS[name]()
