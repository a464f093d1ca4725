"""The device half: bundles in, checked frames out. Never imports torch or onnx.

    from fmdeploy.runtime import Runtime
    runtime = Runtime("bundle")
    frame = runtime.infer({"lidar": lidar, "camera": camera})
    if frame.valid: use(frame.outputs["bev"])
"""

from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Frame, Reason
from fmdeploy.runtime.guards.content import GuardConfig
from fmdeploy.runtime.session import Runtime

__all__ = ["Bundle", "Frame", "GuardConfig", "Reason", "Runtime", "open_bundle"]
