"""Loss weightings over timesteps, all behind ``loss = weighting(losses, timesteps)``.

One scale: a predefined weighting is a function of log_snr (natural log, float64) giving a
log-weight on the x0 error, the convention of Min-SNR (Hang et al. 2023). The squared error of
epsilon is SNR times that of x0, the one of v SNR + 1 times, so on the model's own target the
log-weight is less by 0 (sample), log_snr (epsilon), softplus(log_snr) (v) or 2 softplus(log_snr /
2) (flow, whose error noise - x0 has the factor (1 + sqrt(SNR))^2).

Dy-Sigma is an independent reconstruction from the abstract (Liu, Ye, Liu, Qin, IJCNN 2024), not the
authors' formulas.
"""

from .base import Setting, Weighting
from .dy_sigma import VARIANTS, DySigma, Variant
from .formulas import PLAIN, PREDEFINED, log_conversion, log_weight
from .gramian import GRAMIAN_RULES
from .measures import effective_sample_size, fluctuation, share_changed
from .registry import WEIGHTINGS, make_weighting
from .scalarization import SCALARIZATION_RULES

__all__ = [
    "GRAMIAN_RULES",
    "PLAIN",
    "PREDEFINED",
    "SCALARIZATION_RULES",
    "VARIANTS",
    "WEIGHTINGS",
    "DySigma",
    "Setting",
    "Variant",
    "Weighting",
    "effective_sample_size",
    "fluctuation",
    "log_conversion",
    "log_weight",
    "make_weighting",
    "share_changed",
]
