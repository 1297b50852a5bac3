"""The student's place in a pipeline: the adapter "student" on its networks, together with LoRAs of the user."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.peft_utils import delete_adapter_layers
from torch import nn

from ...errors import TDMError
from ..families import Family
from ..loras.adapters import (
    active_adapters,
    is_on,
    require_no_gguf,
    require_unfused,
    set_active,
    staying_active,
    tuner_layers,
)
from ..loras.fusing import require_all_counted, require_fusable
from ..loras.pairs import Layers, Lora, peft_config, state_dict_of
from ..loras.unchanged import unchanged_on_error
from ..turns import Turns

STUDENT_ADAPTER = "student"  # the student's adapter name, for `pipe.set_adapters`


class StudentAdapter(DiffusionPipeline):
    """The half of `TDMPipeline` that handles adapters and knows peft."""

    family: Family
    turns: Turns
    _merged_adapters: Any  # diffusers' own note of what was fused
    _sampler: Any  # the scheduler that came with the student
    _teaching = False

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load a LoRA next to the student: the stock method, except that all adapters that were on stay on.

        Stock pipelines leave only the newest on, which would switch the student off. Strengths are set as ever, with
        ``pipe.set_adapters(["student", "style"], [1.0, 0.7])``, in any order.

        Raises:
            Exception: whatever the stock method raises for a LoRA that does not fit; the pipeline is then as it was.
        """
        loader: Any = super()
        networks = self._adaptable().values()
        with self.turns.turn(), unchanged_on_error(networks), staying_active(networks):
            loader.load_lora_weights(*args, **kwargs)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put adapters into the weights: the stock method, except that it refuses what would drop an adapter.

        Args:
            components: where to fuse; None: everywhere.
            lora_scale, safe_fusing, kwargs: as in the stock method.
            adapter_names: which to fuse; None: all that are on.

        Raises:
            TDMError: an adapter that is on would be dropped, because it shares layers with one that is fused alone; an
                adapter would be fused in some of its networks only; the adapters are switched off; or the weights are
                GGUF.
        """
        networks = self._adaptable()
        where = list(networks) if components is None else list(components)
        names = None if adapter_names is None else list(adapter_names)
        with self.turns.turn():
            fused = [network for component, network in networks.items() if component in where]
            require_no_gguf(fused, "into which nothing can be fused; LoRAs work without being fused")
            require_fusable(networks, where, names)
            fuse: Any = super().fuse_lora  # type: ignore[misc]
            fuse(where, lora_scale, safe_fusing, names, **kwargs)

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are in the weights. peft takes them out by itself where it loads another one."""
        merged: set[str] = self._merged_adapters
        attached = {name for network in self._adaptable().values() for name in getattr(network, "peft_config", {})}
        layers = (layer for network in self._adaptable().values() for layer in tuner_layers(network))
        return merged - (attached - {name for layer in layers for name in layer.merged_adapters})

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Take fused adapters out of the weights: the stock method.

        Args:
            components: where; None: everywhere, as in `fuse_lora`.
            kwargs: as in the stock method.
        """
        unfuse: Any = super().unfuse_lora  # type: ignore[misc]
        with self.turns.turn():
            unfuse(list(self._adaptable()) if components is None else list(components), **kwargs)

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Choose which adapters are on, and at what strength, as the stock method does.

        Raises:
            TDMError: adapters are fused into the weights, where they keep the strength that they have.
        """
        require_unfused(self._modules())
        setter: Any = super()
        setter.set_adapters(*args, **kwargs)

    def delete_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Delete adapters as the stock method does.

        Raises:
            TDMError: adapters are fused into the weights, which would keep them for good.
        """
        require_unfused(self._modules())
        deleter: Any = super()
        deleter.delete_adapters(*args, **kwargs)

    def _replace_student(self, placed: Layers) -> None:
        """Put a student's layers in the place of the one that is there. Other adapters stay as they are, on or off."""
        networks = self._adaptable()
        active = {name: active_adapters(network) for name, network in networks.items()}
        with unchanged_on_error(networks.values()):
            self._detach()
            for name, layers in placed.items():
                self._attach(name, layers)
            for name, network in networks.items():  # the loaders made the new adapter the only active one
                set_active(network, [*(other for other in active[name] if other != STUDENT_ADAPTER), STUDENT_ADAPTER])

    def _attach(self, component: str, layers: Mapping[str, Lora]) -> None:
        """Put the student's layers of one network into it."""
        options: dict[str, Any] = {"adapter_name": STUDENT_ADAPTER, "low_cpu_mem_usage": True, "_pipeline": self}
        settings = {f"{component}.{key}": value for key, value in peft_config(layers).items()}
        state = {f"{component}.{key}": tensor for key, tensor in state_dict_of(layers).items()}
        network = self._adaptable()[component]
        if component == self.family.denoiser:
            network.load_lora_adapter(state, prefix=component, metadata=settings, **options)
        else:
            # By its own names for the halves: diffusers knows those of peft in the attention of CLIP alone.
            for half, legacy in (("lora_A", "lora_linear_layer.down"), ("lora_B", "lora_linear_layer.up")):
                state = {key.replace(f".{half}.", f".{legacy}."): tensor for key, tensor in state.items()}
            load: Any = self.load_lora_into_text_encoder
            load(state, None, network, prefix=component, metadata=settings, **options)

    def _detach(self) -> None:
        """Take the student out of every network that has it."""
        for component, network in self._adaptable().items():
            if STUDENT_ADAPTER not in getattr(network, "peft_config", {}):
                continue
            if component == self.family.denoiser:
                network.delete_adapters(STUDENT_ADAPTER)
            else:
                delete_adapter_layers(network, STUDENT_ADAPTER)

    @property
    def denoiser(self) -> Any:
        denoiser = getattr(self, self.family.denoiser)
        return getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps it

    def _modules(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

    def _adaptable(self) -> dict[str, Any]:
        """The networks that can take a LoRA, by component: the denoiser, and text encoders (see `encoders.py`)."""
        names: list[str] = self._lora_loadable_modules
        encoders = {name: getattr(self, name, None) for name in names if name.startswith("text_encoder")}
        return {self.family.denoiser: self.denoiser} | {k: v for k, v in encoders.items() if v is not None}

    def require_unfused(self) -> None:
        """Raise TDMError if an adapter is part of the weights, even if it was unloaded after that."""
        require_unfused(self._modules())
        if self.fused_loras:
            names = ", ".join(sorted(self.fused_loras))
            raise TDMError(f"the adapters {names} were fused into the weights; load the base and the student again")

    def check_student(self) -> None:
        """Before a call: the student's sampler must not run the base alone. Another scheduler is the caller's choice.

        Raises:
            TDMError: the student is gone, after `unload_lora_weights` or `delete_adapters`; or an adapter that is on
                would be dropped, because others are fused into its layers.
        """
        require_all_counted(self._adaptable().values())
        if self._teaching or self.scheduler is not self._sampler or STUDENT_ADAPTER in self.fused_loras:
            return
        networks = self._adaptable().values()
        if not any(STUDENT_ADAPTER in getattr(network, "peft_config", {}) for network in networks):
            raise TDMError("the student is no longer loaded; call load_student, or use pipe.teacher() for the base")
        if not any(is_on(network, STUDENT_ADAPTER) for network in networks):
            warnings.warn(
                "the student is switched off, but its sampler and defaults are in place: these are not the teacher's "
                "pictures (those: pipe.teacher()); switch it on with enable_lora() or set_adapters()",
                stacklevel=4,
            )
