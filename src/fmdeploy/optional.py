"""Heavy and optional packages are imported by name here, and only when needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from fmdeploy.errors import MissingDependencyError

EXTRA_OF = {
    "torch": "train",
    "transformers": "train",
    "accelerate": "train",
    "peft": "train",
    "scipy": "train",
    "mcap": "import",
    "mcap_protobuf": "import",
    "mcap_ros2": "import",
    "webdataset": "import",
    "PIL": "import",
    "modelopt": "train",
    "modelopt.torch.opt": "train",
    "modelopt.torch.quantization": "train",
    "onnx": "export",
    "onnxsim": "export",
    "highway_env": "sim",
    "gymnasium": "sim",
    "matplotlib": "report",
    "jinja2": "report",
    "openvino": "openvino",
    "tensorrt_rtx": "trt-rtx",
    "tensorrt": "tensorrt",
    "torch_tensorrt": "torch-tensorrt",
    "timm": "timm",
    "docker": "docker",
    "model_signing": "sign",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "httptools": "serve",
    "uvloop": "serve",
    "sklearn": "dev",
}
HINT = {
    "tensorrt": "On Jetson it comes with JetPack (python3-libnvinfer; a venv needs --system-site-packages). ",
}


def require(name: str) -> ModuleType:
    """Import and return the package `name`.

    Raises:
        MissingDependencyError: it is not installed, or does not import; the text says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        extra = EXTRA_OF.get(name) or EXTRA_OF.get(root)
        remedy = f"pip install 'fmdeploy[{extra}]'" if extra else f"pip install {root}"
        raise MissingDependencyError(
            f"this needs the Python package {name}, which does not import: {error}",
            fix=f"{HINT.get(root, '')}Install it with: {remedy}",
        ) from error
