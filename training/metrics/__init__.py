"""Measures of samples that need no downloaded weights: pure functions of tensors, one file a kind.

What looks at pictures takes uint8 ``(..., 3, H, W)``; what compares laws or samples takes points ``[n, D]`` as well, be
they features of pictures or the samples of a low-dimensional task. `extras` is apart: it needs weights.
"""

from .accuracy import accuracies
from .agreement import agreement
from .bootstrap import Value, bootstrap_interval, measured
from .colours import colour_ratios, colour_statistics
from .distances import distance, distances_by_prompt, energy_distance, frechet_distance, sliced_wasserstein
from .diversity import diversity, spread
from .features import features
from .spectrum import power_ratios, power_spectrum

__all__ = [
    "Value",
    "accuracies",
    "agreement",
    "bootstrap_interval",
    "colour_ratios",
    "colour_statistics",
    "distance",
    "distances_by_prompt",
    "diversity",
    "energy_distance",
    "features",
    "frechet_distance",
    "measured",
    "power_ratios",
    "power_spectrum",
    "sliced_wasserstein",
    "spread",
]
