"""Predicted latency: per-layer roofline of an ONNX file on a described device, with a band. Free of torch."""
