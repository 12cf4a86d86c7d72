"""Gradients of the losses of timestep bins: which bins conflict, by how much, and how much of it is minibatch noise."""

from .estimator import SKETCH_COLUMNS, bin_gramian, bin_timesteps, cosine_matrix, layer_group
from .measure import conflicts
from .report import ConflictReport
from .transfer import NegativeTransfer, negative_transfer

__all__ = [
    "SKETCH_COLUMNS",
    "ConflictReport",
    "NegativeTransfer",
    "bin_gramian",
    "bin_timesteps",
    "conflicts",
    "cosine_matrix",
    "layer_group",
    "negative_transfer",
]
