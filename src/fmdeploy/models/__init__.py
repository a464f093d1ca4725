"""Teacher and student networks, and the ways to name, save and load them."""

from fmdeploy.models.outputs import example_inputs, input_list, named_outputs, num_parameters, predictor

__all__ = ["example_inputs", "input_list", "named_outputs", "num_parameters", "predictor"]
