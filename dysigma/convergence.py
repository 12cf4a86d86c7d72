"""Images to a threshold, speed-ups and tables of them: what ``dysigma.lab.convergence`` has."""

from .lab.convergence import *  # noqa: F403
from .lab.convergence import __all__ as __all__
