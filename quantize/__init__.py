"""INT8: placement, calibration, PTQ and QAT."""
