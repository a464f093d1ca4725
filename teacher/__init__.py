"""Teachers: training, adaptation and the feature cache."""
