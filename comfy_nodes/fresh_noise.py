"""The noise of students that were trained with fresh noise at each step: one seed is one picture.

It is that of `TDMPipeline`: alone, in a batch, taken out of a batch, and with its schedule split over two samplers.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import TDMError
from ..pipelines.picture_noise import generators_of

_SEARCHED = 2**26  # numbers of a seed that are searched for the noise of a picture
_REMEMBERED = 256  # samples


class _Left(NamedTuple):
    """A sample that a sampler left on its way, and where the noise of its next step begins."""

    level: float
    sample: Tensor
    state: Tensor


# The next sampler of a split schedule is told neither seed nor place in the batch (DisableNoise has seed 0): it knows
# the samples again.
_left: deque[_Left] = deque(maxlen=_REMEMBERED)


class FreshNoise:
    """The noise of the steps of one sampler."""

    def __init__(self, x: Tensor, level: float, first: Tensor, seed: int | None, run: list[float]) -> None:
        """Find the generator of each sample.

        Args:
            x: (B, ...), the samples that it begins with.
            level: their level.
            first: (B, ...), core's noise in them; zeros if a sampler before has put it there.
            seed: of that noise; None is torch's own generator.
            run: the levels of the whole schedule.

        Raises:
            TDMError: there is neither noise nor seed, and no sampler has left these samples at this level.
        """
        self._shape = (1, *x.shape[1:])
        begun = bool(first.any())
        known = [None if begun else _known(sample, level) for sample in x]
        if all(known):
            self._generators = [Generator().set_state(left.state) for left in known if left]
            return
        if not begun and not seed:
            raise TDMError(
                "this student takes fresh noise at each step, and this sampler has neither noise nor a seed for it: "
                "use SamplerCustom, with add_noise off and the seed of the first sampler (not 0)"
            )
        if seed is None:
            self._generators = [torch.default_generator] * len(x)
            return
        places = _places_of(seed, first) if begun else list(range(len(x)))
        self._generators = generators_of(Generator().manual_seed(seed), places, x.shape[1:])
        for _ in range(run.index(level) if level in run else 0):
            self.draw()

    def draw(self) -> Tensor:
        """Noise for the next step, (B, ...) on the CPU."""
        return torch.cat([torch.randn(self._shape, generator=generator) for generator in self._generators])

    def leave(self, x: Tensor, level: float) -> None:
        """Remember samples that are not clean yet, for the sampler that goes on with them."""
        for sample, generator in zip(x, self._generators, strict=True):
            _left.append(_Left(level, sample.to("cpu", torch.float32, copy=True), generator.get_state()))


def _known(sample: Tensor, level: float) -> _Left | None:
    """The sample that was left at this level, up to the float32 rounding of scaling it there and back."""
    sample = sample.to("cpu", torch.float32)
    norm = float(sample.norm())
    for left in reversed(_left):
        fits = abs(left.level - level) <= 1e-6 * level and left.sample.shape == sample.shape
        if fits and float((left.sample - sample).norm()) <= 1e-4 * norm:
            return left
    return None


def _places_of(seed: int, noise: Tensor) -> list[int]:
    """The places of samples in the batch of a seed, by their noise: that of a picture which was taken out of a batch is
    the one that it had there. Where the noise is not core's, they are counted.
    """
    each = [one.float().cpu() for one in noise]
    generator, places = Generator().manual_seed(seed), dict[int, Any]()
    for place in range(max(_SEARCHED // noise[0].numel(), len(each))):
        drawn = torch.randn((1, *noise.shape[1:]), generator=generator)[0]
        places |= {i: place for i, one in enumerate(each) if i not in places and torch.equal(one, drawn)}
        if len(places) == len(each):
            break
    return [places.get(i, i) for i in range(len(each))]
