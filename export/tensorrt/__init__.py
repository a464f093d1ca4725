"""TensorRT from ONNX: the builder, the compile check that needs no GPU, and the `build` verb.

Nothing here imports torch or onnx: the `build` verb runs on the device.
"""
