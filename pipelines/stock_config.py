"""What the config of a stock diffusers scheduler says in the arguments of `TDMScheduler`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers

from ..errors import TDMError


def arguments_from_stock(
    config: Mapping[str, Any], overrides: Mapping[str, Any], arguments: set[str]
) -> dict[str, Any]:
    """`TDMScheduler` arguments of a stock scheduler's config.

    Goes by keys, not by class: the config of a live scheduler does not name its class. `clip_sample` is not followed,
    with a warning: bases that were saved with the scheduler of their training have it by default.

    Args:
        config: of the stock scheduler.
        overrides: arguments that win over it.
        arguments: the names that `TDMScheduler` takes.

    Raises:
        TDMError: the config has no schedule that `TDMScheduler` can follow.
    """
    stock = getattr(diffusers, str(config.get("_class_name")), None)
    defaults = {}
    if inspect.isclass(stock):  # a file may lack keys that the class has gained since
        parameters = inspect.signature(stock.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    merged = {**defaults, **config, **overrides}
    translated = {name: merged[name] for name in arguments if name in merged}
    # How a student takes its noise is a matter of its training, not of the base's scheduler.
    translated["stochastic_sampling"] = overrides.get("stochastic_sampling", False)
    translated["eta"] = overrides.get("eta", 1.0)

    if "beta_schedule" not in merged:
        if "shift" not in merged:
            raise TDMError("cannot follow this scheduler config: it has neither beta_schedule nor shift")
        translated = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **translated}
        if "flow_shift" not in overrides:
            translated["flow_shift"] = merged["shift"]
    if merged.get("clip_sample") and "snr_shift_scale" not in merged:  # CogVideoX's have the option and never use it
        warnings.warn(
            "the scheduler config has clip_sample=True, the default of DDPM and DDIM; latents are not clipped here",
            stacklevel=2,
        )
    for name, value, reason in (
        ("thresholding", True, "it clips x0"),
        ("invert_sigmas", True, "its time runs backwards"),
        ("timestep_type", "continuous", "its network takes log sigma for a timestep"),
    ):
        if merged.get(name) == value:
            raise TDMError(f"cannot follow {name}={value!r} of the scheduler config: {reason}")
    return translated
