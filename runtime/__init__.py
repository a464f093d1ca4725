"""The runtime: verified bundles, guarded inference, gates. Free of torch and onnx."""
