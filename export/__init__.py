"""ONNX variants, dialects, parity and the bundle."""
