"""ONNX files: reading them safely, editing their graphs, running them in ONNX Runtime. Shared by several stages."""
