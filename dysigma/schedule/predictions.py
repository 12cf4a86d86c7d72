"""What a network can predict, by the names of diffusers."""

from __future__ import annotations

from ..checks import check_name

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

_ALIASES = {"x0": "sample", "v": "v_prediction", "eps": "epsilon", "flow": "flow_prediction"}


def canonical_prediction_type(name: str) -> str:
    """The diffusers name of a prediction type; "x0", "v", "eps" and "flow" are aliases.

    flow_prediction is noise - x0, the velocity of the rectified flow. Raises ValueError for a name
    that is neither an alias nor one of PREDICTION_TYPES.

    >>> canonical_prediction_type("x0")
    'sample'
    """
    check_name("prediction type", name, [*PREDICTION_TYPES, *_ALIASES], error=ValueError)
    return _ALIASES.get(name, name)
