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
from .metrics.spectrum import octaves, sharpness
from .worlds.stickers.scene import Scene

# Of the values whose names do not say it.
EXPLAINED = {
    "sharpness": "power at wavelengths of 2 to 16 pixels, over the teacher's",
    "ode": "distance to the teacher's picture from the same noise, over the distance of two of the teacher's pictures",
    "sliced_wasserstein": "to the teacher's, on random features",
    "frechet": "to the teacher's, on random features with a fixed seed; it is not FID",
    "clip": "CLIP score",
    "hpsv2": "Human Preference Score v2",
    "image_reward": "ImageReward",
    "fid": "FID to the real pictures",
}


def _finite(values: dict[str, Value]) -> dict[str, Value]:
    """The values without ratios to nothing, such as the saturation of pictures over that of grey ones."""
    return {name: v for name, v in values.items() if all(math.isfinite(x) for x in v if x is not None)}


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
        pictures: (N, 3, H, W), of N prompts.
        repeats: (P, S, 3, H, W), of the first P of these prompts, from S other noises each.
        reference: as ``repeats``, from S noises of their own.
        wanted: what the N pictures should show; None if nobody can tell.
    """

    def __init__(self, pictures: Tensor, repeats: Tensor, reference: Tensor, wanted: Sequence[Scene] | None) -> None:
        self.pictures, self.reference, self.wanted = pictures, reference, wanted
        self._diversity = diversity_by_prompt(repeats)
        self._moments = moments(pictures)
        self._spectrum = power_spectrum(pictures)

    def measures(self, pictures: Tensor, repeats: Tensor) -> Measures:
        """The measures of a sampler's pictures (N, 3, H, W) and repeats (P, S, 3, H, W), which have the prompts and
        noises of the teacher's.
        """
        measures = Measures()
        if self.wanted is not None:
            attributes, combinations = accuracies(pictures, self.wanted)
            measures.values["accuracy"] = measured(attributes.pop(ALL))
            measures.attributes = {name: measured(right) for name, right in attributes.items()}
            measures.combinations = {name: measured(right) for name, right in combinations.items()}
        measures.values["distance"] = measured(distances_by_prompt(repeats, self.reference))
        measures.values["diversity"] = measured(torch.stack([diversity_by_prompt(repeats), self._diversity], 1), ratio)
        measures.values |= self._colours(pictures)
        prompts = len(self.reference)
        pairs = agreement(pictures[:prompts], self.pictures[:prompts], self.reference)
        measures.values["ode"] = measured(pairs, ratio)
        measures.values |= self._of_laws(repeats)
        spectra = torch.stack([power_spectrum(pictures), self._spectrum], 1)
        measures.values["sharpness"] = measured(spectra, sharpness)
        bands = octaves(*pictures.shape[2:])
        measures.spectrum = _finite({name: measured(spectra[..., i], ratio) for i, name in enumerate(bands)})
        measures.values = _finite(measures.values)
        return measures

    def _colours(self, pictures: Tensor) -> dict[str, Value]:
        both = torch.stack([moments(pictures), self._moments], 2)  # (N, 7, 2)

        def over(i: int) -> Value:
            return measured(both, lambda m: colour_statistics(m[..., 0])[i] / colour_statistics(m[..., 1])[i])

        return {name: over(i) for i, name in enumerate(COLOURS)}

    def _of_laws(self, repeats: Tensor) -> dict[str, Value]:
        """Distances of all pictures together. They have no interval: drawing prompts twice makes a law narrower, so
        that resampling would show another number than the measure's.
        """
        x, y = repeats.flatten(0, 1), self.reference.flatten(0, 1)
        values = {"sliced_wasserstein": Value(picture_sliced_wasserstein(x, y))}
        if len(x) > DIMENSIONS:
            values["frechet"] = Value(picture_frechet(x, y))
        return values
