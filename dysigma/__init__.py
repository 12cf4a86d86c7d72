"""dysigma: loss weightings for diffusion training, and the analysis of the timestep objectives they trade off."""

__version__ = "0.1.0"
