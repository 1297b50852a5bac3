"""What a network may predict, in the names of diffusers. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
