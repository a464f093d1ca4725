"""Static checks of an ONNX file on the device, without the onnx package and without protobuf."""
