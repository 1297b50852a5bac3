"""Generators for the fresh noise of a batch, one for each picture: it is the same alone and in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator

_LARGEST_SEED = 2**63 - 1


def generators_of(generator: Generator, pictures: Sequence[int], first_noise: Sequence[int] | None) -> list[Generator]:
    """The generators that pictures of one batch draw the noise of their later steps from.

    The first picture goes on where `generator` stands after one picture's first noise, as a call for that picture alone
    does. The others' generators are seeded with numbers drawn from it, which do not depend on the size of the batch.

    Args:
        generator: on the CPU, as it was before the first noise. It is not advanced.
        pictures: their places in the batch that the generator's noise begins with, from 0.
        first_noise: the shape of one picture's first noise; None if that does not come from `generator`.
    """
    seeds = torch.randint(_LARGEST_SEED, (max(pictures) + 1,), generator=_copy(generator)).tolist()
    return [
        _behind(_copy(generator), first_noise) if picture == 0 else Generator().manual_seed(seeds[picture])
        for picture in pictures
    ]


def _copy(generator: Generator) -> Generator:
    return Generator().set_state(generator.get_state())


def _behind(generator: Generator, noise: Sequence[int] | None) -> Generator:
    if noise is not None:
        torch.randn(tuple(noise), generator=generator)
    return generator
