"""The fields of ONNX's messages up to IR version 14, by their numbers in onnx.proto; a test holds them against onnx."""

from __future__ import annotations

from fmdeploy.runtime.onnxcheck.wire import BYTES, FIXED32, FIXED64, VARINT, Field, Fields

MODEL: Fields = {
    1: Field("ir_version", VARINT), 8: Field("opset_import", BYTES, True), 2: Field("producer_name", BYTES),
    3: Field("producer_version", BYTES), 4: Field("domain", BYTES), 5: Field("model_version", VARINT),
    6: Field("doc_string", BYTES), 7: Field("graph", BYTES), 14: Field("metadata_props", BYTES, True),
    20: Field("training_info", BYTES, True), 25: Field("functions", BYTES, True),
    26: Field("configuration", BYTES, True),
}
GRAPH: Fields = {
    1: Field("node", BYTES, True), 2: Field("name", BYTES), 5: Field("initializer", BYTES, True),
    15: Field("sparse_initializer", BYTES, True), 10: Field("doc_string", BYTES), 11: Field("input", BYTES, True),
    12: Field("output", BYTES, True), 13: Field("value_info", BYTES, True),
    14: Field("quantization_annotation", BYTES, True), 16: Field("metadata_props", BYTES, True),
}
NODE: Fields = {
    1: Field("input", BYTES, True), 2: Field("output", BYTES, True), 3: Field("name", BYTES),
    4: Field("op_type", BYTES), 7: Field("domain", BYTES), 8: Field("overload", BYTES),
    5: Field("attribute", BYTES, True), 6: Field("doc_string", BYTES), 9: Field("metadata_props", BYTES, True),
    10: Field("device_configurations", BYTES, True),
}
ATTRIBUTE: Fields = {
    1: Field("name", BYTES), 21: Field("ref_attr_name", BYTES), 13: Field("doc_string", BYTES),
    20: Field("type", VARINT), 2: Field("f", FIXED32), 3: Field("i", VARINT), 4: Field("s", BYTES),
    5: Field("t", BYTES), 6: Field("g", BYTES), 22: Field("sparse_tensor", BYTES), 14: Field("tp", BYTES),
    7: Field("floats", FIXED32, True), 8: Field("ints", VARINT, True), 9: Field("strings", BYTES, True),
    10: Field("tensors", BYTES, True), 11: Field("graphs", BYTES, True), 23: Field("sparse_tensors", BYTES, True),
    15: Field("type_protos", BYTES, True),
}
TENSOR: Fields = {
    1: Field("dims", VARINT, True), 2: Field("data_type", VARINT), 3: Field("segment", BYTES),
    4: Field("float_data", FIXED32, True), 5: Field("int32_data", VARINT, True),
    6: Field("string_data", BYTES, True), 7: Field("int64_data", VARINT, True), 8: Field("name", BYTES),
    12: Field("doc_string", BYTES), 9: Field("raw_data", BYTES), 13: Field("external_data", BYTES, True),
    14: Field("data_location", VARINT), 10: Field("double_data", FIXED64, True),
    11: Field("uint64_data", VARINT, True), 16: Field("metadata_props", BYTES, True),
}
VALUE_INFO: Fields = {
    1: Field("name", BYTES), 2: Field("type", BYTES), 3: Field("doc_string", BYTES),
    4: Field("metadata_props", BYTES, True),
}
TYPE: Fields = {
    1: Field("tensor_type", BYTES), 4: Field("sequence_type", BYTES), 5: Field("map_type", BYTES),
    9: Field("optional_type", BYTES), 8: Field("sparse_tensor_type", BYTES), 7: Field("opaque_type", BYTES),
    6: Field("denotation", BYTES),
}
TENSOR_TYPE: Fields = {1: Field("elem_type", VARINT), 2: Field("shape", BYTES)}
SHAPE: Fields = {1: Field("dim", BYTES, True)}
DIM: Fields = {1: Field("dim_value", VARINT), 2: Field("dim_param", BYTES), 3: Field("denotation", BYTES)}
OPSET: Fields = {1: Field("domain", BYTES), 2: Field("version", VARINT)}
