"""fmdeploy takes a driving foundation model to a Jetson Orin, with proof."""

__version__ = "0.1.0"
