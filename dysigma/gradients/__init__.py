"""Gradients of the losses of timestep bins: which conflict, by how much, and how much is minibatch noise."""

from .batches import bin_timesteps
from .estimator import bin_gramian, cosine_matrix, layer_group
from .measure import conflicts
from .report import ConflictReport
from .transfer import NegativeTransfer, negative_transfer

__all__ = [
    "ConflictReport",
    "NegativeTransfer",
    "bin_gramian",
    "bin_timesteps",
    "conflicts",
    "cosine_matrix",
    "layer_group",
    "negative_transfer",
]
