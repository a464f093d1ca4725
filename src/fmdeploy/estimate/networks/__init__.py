"""Published networks, written from their papers and tables: the other half of a published latency.

A latency says nothing without the network that had it. These descriptions build ONNX graphs whose parameters and
multiply-adds equal the published ones (a test holds them to it); they carry no trained weights.
"""
