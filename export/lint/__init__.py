"""Rules about ONNX files: what TensorRT, its DLA or ONNX Runtime will refuse, miscompute or slow down, and the fix."""
