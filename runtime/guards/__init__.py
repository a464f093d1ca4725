"""Guards between the sensors and the model, and behind the model."""
