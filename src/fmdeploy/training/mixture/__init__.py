"""How often a training run sees what: weights, temperature, replay of old domains."""
