"""Which weighting is this, really? Loss weights of any trainer on the one scale of `dysigma.weightings`.

`audit` compares the loss weights of a function with what they claim to be, up to a factor, and
names what they are. `preview` multiplies the density of the timesteps with the weight: the
objective that a training run really minimises.
"""

from .levels import LEVELS
from .product import Preview, preview
from .report import Audit, audit

__all__ = ["LEVELS", "Audit", "Preview", "audit", "preview"]
