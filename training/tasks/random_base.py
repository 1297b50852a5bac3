"""A base with random weights in published shapes: it costs what the real one costs, and knows nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...pipelines.base_weights import reading
from ...pipelines.bases import family_of_base, pipeline_without_weights
from ...pipelines.families import Condition
from ..config import MemoryConfig
from .base_model import BaseModel
from .base_storage import stored
from .prompt_cache import TextEncoders

SEED = 0


class RandomBase(BaseModel):
    """A `BaseModel` of a folder that holds configs alone. No file of weights, tokenizer or text encoder is read: the
    weights are random, and every prompt is a random embedding of full length. It has no VAE, and so draws no previews.
    """

    @classmethod
    def of(cls, folder: str | Path) -> RandomBase:
        """The base of a folder of configs.

        Raises:
            TDMError: there is none, or it is not supported.
        """
        return cls(str(folder), family_of_base(str(folder)))

    def encoder_identity(self, dtype: torch.dtype) -> dict[str, Any]:
        """See `BaseModel`: what shapes and values of the embeddings depend on."""
        return {"random": SEED, "configs": self.content(), "dtype": str(dtype)}

    @contextmanager
    def encoders(self, device: torch.device, dtype: torch.dtype, negative_prompt: str = "") -> Iterator[TextEncoders]:  # noqa: ARG002
        """See `BaseModel`: random embeddings."""
        _, pipe = pipeline_without_weights(self.folder)
        generator = torch.Generator().manual_seed(SEED)
        yield TextEncoders(
            lambda prompts: self._embeddings(pipe, len(prompts), dtype, generator),
            lambda: self._embeddings(pipe, 1, dtype, generator),
        )

    def pipeline(self, memory: MemoryConfig, device: torch.device) -> tuple[Any, torch.dtype]:
        """See `BaseModel`: the same each time.

        Raises:
            TDMError: a config cannot be read, or the storage does not work here.
        """
        name = self.family.denoiser
        _, pipe = pipeline_without_weights(self.folder)
        load = functools.partial(network_with_random_weights, type(getattr(pipe, name)), self.folder, name, device)
        denoiser, dtype = stored(load, memory, device)
        setattr(pipe, name, denoiser)
        for absent in ("vae", *(part for part in pipe.components if part.startswith("text_encoder"))):
            setattr(pipe, absent, None)
        pipe.set_progress_bar_config(disable=True)
        return pipe, dtype

    def _embeddings(self, pipe: Any, n: int, dtype: torch.dtype, generator: torch.Generator) -> Condition:
        """What `Family.encode_text` gives for n prompts of full length, in its shapes."""
        size = self.family.default_size(pipe)
        text: Condition = {}
        for key, blank in self.family.blank(pipe, n, size).items():
            if blank.is_floating_point():
                text[key] = torch.randn(blank.shape, generator=generator).to(dtype)
            else:  # a mask of ones, or lengths
                text[key] = torch.ones_like(blank, device="cpu") if blank.is_meta else blank
        facts = self.family.facts(pipe, text, size)
        return {key: value for key, value in text.items() if key not in facts}


def network_with_random_weights(
    network_class: Any, folder: str, component: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """A network of diffusers in main memory, from its config. Its layers keep the size of what passes through them.

    Args:
        network_class: of diffusers.
        folder, component: where its config is.
        device: draws the weights, the same ones each time.
        dtype: of the weights.

    Raises:
        TDMError: the config cannot be read.
    """
    with reading(f"the config of {component} of the base {folder}"):
        config = network_class.load_config(folder, subfolder=component)
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(config)
    generator = torch.Generator(device).manual_seed(SEED)
    whole = set(getattr(network, "_keep_in_fp32_modules", None) or ())  # by diffusers, when it loads a file
    for place, module in network.named_modules():
        kept = torch.float32 if whole & set(place.split(".")) else dtype
        for name, weight in list(module.named_parameters(recurse=False)):
            values = _values(name, weight, generator).to("cpu", kept)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return network


def _values(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix of unit gain; a norm's weight is 1, a bias 0."""
    if weight.ndim < 2:
        return torch.full(weight.shape, float(name == "weight"))
    gain = 1 / math.sqrt(math.prod(weight.shape[1:]))
    return torch.randn(weight.shape, generator=generator, device=generator.device) * gain
