"""All measures of one sampler's pictures against its teacher's: what a row of `tdm eval` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .metrics import accuracies, agreement, distances_by_prompt, measured, power_spectrum
from .metrics.accuracy import ALL
from .metrics.bootstrap import Value, ratio
from .metrics.colours import COLOURS, colour_statistics, moments
from .metrics.distances import DIMENSIONS, picture_frechet, picture_sliced_wasserstein
from .metrics.diversity import diversity_by_prompt
from .metrics.spectrum import octaves
from .worlds.stickers.scene import Scene

# Of the values whose names do not say it.
EXPLAINED = {
    "ode": "distance to the teacher's picture from the same noise, over the distance of two of the teacher's pictures",
    "sliced_wasserstein": "to the teacher's, on random features",
    "frechet": "to the teacher's, on random features with a fixed seed; it is not FID",
    "clip": "CLIP score",
    "hpsv2": "Human Preference Score v2",
    "image_reward": "ImageReward",
    "fid": "FID to the real pictures",
}


def _finite(found: dict[str, Value]) -> dict[str, Value]:
    """Without the ratios to nothing, such as the saturation of pictures over that of grey ones: they say nothing."""
    return {name: v for name, v in found.items() if all(math.isfinite(x) for x in v if x is not None)}


@dataclass
class Measures:
    """Numbers with their intervals.

    Attributes:
        values: by name: "accuracy" (of everything that the prompt says), "distance", "diversity", "brightness" and so
            on.
        attributes, combinations: accuracy of each part of a prompt, and of each held-out combination.
        spectrum: power in each octave, over the teacher's.
    """

    values: dict[str, Value] = field(default_factory=dict)
    attributes: dict[str, Value] = field(default_factory=dict)
    combinations: dict[str, Value] = field(default_factory=dict)
    spectrum: dict[str, Value] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The first of the values, for people."""
        name, value = next(iter(self.values.items()))
        return f"{name} {value.value:.3f}"


class Reference:
    """The teacher's pictures, uint8, which all others are measured against.

    Args:
        made: (N, 3, H, W), of N prompts.
        again: (P, S, 3, H, W), of the first P of these prompts, from S other noises each.
        reference: as ``again``, from other noises still.
        wanted: what the N pictures should show; None if nobody can tell.
    """

    def __init__(self, made: Tensor, again: Tensor, reference: Tensor, wanted: Sequence[Scene] | None) -> None:
        self.made, self.reference, self.wanted = made, reference, wanted
        self._diversity = diversity_by_prompt(again)
        self._moments = moments(made)
        self._spectrum = power_spectrum(made)

    def measures(self, made: Tensor, again: Tensor) -> Measures:
        """Of a sampler's pictures from the same prompts and noises as the teacher's."""
        found = Measures()
        if self.wanted is not None:
            attributes, combinations = accuracies(made, self.wanted)
            found.values["accuracy"] = measured(attributes.pop(ALL))
            found.attributes = {name: measured(right) for name, right in attributes.items()}
            found.combinations = {name: measured(right) for name, right in combinations.items()}
        found.values["distance"] = measured(distances_by_prompt(again, self.reference))
        found.values["diversity"] = measured(torch.stack([diversity_by_prompt(again), self._diversity], 1), ratio)
        found.values |= self._colours(made)
        prompts = len(self.reference)
        pairs = agreement(made[:prompts], self.made[:prompts], self.reference)
        found.values["ode"] = measured(pairs, ratio)
        found.values |= self._of_laws(again)
        spectra = torch.stack([power_spectrum(made), self._spectrum], 2)
        bands = octaves(*made.shape[2:])
        found.spectrum = _finite({name: measured(spectra[:, i], ratio) for i, name in enumerate(bands)})
        found.values = _finite(found.values)
        return found

    def _colours(self, made: Tensor) -> dict[str, Value]:
        both = torch.stack([moments(made), self._moments], 2)  # (N, 7, 2)

        def over(i: int) -> Value:
            return measured(both, lambda m: colour_statistics(m[..., 0])[i] / colour_statistics(m[..., 1])[i])

        return {name: over(i) for i, name in enumerate(COLOURS)}

    def _of_laws(self, again: Tensor) -> dict[str, Value]:
        """Of all pictures together. Drawing prompts twice makes a law narrower, so that resampling would show another
        number than the measure's own: there is no interval.
        """
        x, y = again.flatten(0, 1), self.reference.flatten(0, 1)
        values = {"sliced_wasserstein": Value(picture_sliced_wasserstein(x, y))}
        if len(x) > DIMENSIONS:
            values["frechet"] = Value(picture_frechet(x, y))
        return values
