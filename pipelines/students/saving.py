"""Saving a pipeline with a student: the base and the student file, or the base with the student in its weights."""

from __future__ import annotations

import contextlib
from typing import Any

from ...errors import TDMError
from ...files import whole_folder
from ..bases import Source
from ..loras.adapters import adapters_hidden, lora_of, require_no_gguf, require_wide, tuner_layers
from ..loras.pairs import Layers
from ..scheduler import TDMScheduler
from .adapter import STUDENT_ADAPTER, StudentAdapter
from .file import MERGED_FILE, Student, save_student
from .recipe import HEADER_KEY, STUDENT_FILE, StudentRecipe


class StudentSaving(StudentAdapter):
    """The half of `TDMPipeline` that writes it to a folder."""

    recipe: StudentRecipe
    scheduler: Any
    teacher_scheduler: Any

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Source, *, force: bool = False, **kwargs: Any
    ) -> None:
        """Write the clean base, with its own scheduler, and `student.safetensors` next to it.

        `TDMPipeline.from_pretrained` reads the folder back to the same pipeline; a plain
        `DiffusionPipeline.from_pretrained` gets the base. The folder appears whole or not at all.

        Args:
            save_directory: the folder to write.
            force: replace a folder that is there.
            kwargs: `safe_serialization`, `variant` and `max_shard_size` of diffusers.

        Raises:
            TDMError: the folder exists and is not empty; or the pipeline holds what the folder could not: other
                adapters than the student, a student that is fused, unloaded or not at strength 1.0, weights under
                layerwise casting or as GGUF; or `push_to_hub` is given.

        >>> from tdm import TDMPipeline
        >>> TDMPipeline.from_pretrained().save_pretrained("saved")
        >>> TDMPipeline.from_pretrained("saved").recipe.family
        'pixart'
        """
        with whole_folder(save_directory, force=force) as unfinished:
            student = self._save_networks(str(unfinished), self.teacher_scheduler, merged=False, **kwargs)
            save_student(unfinished / STUDENT_FILE, Student(self.recipe, student))

    def save_merged(self, save_directory: Source, *, force: bool = False, **kwargs: Any) -> None:
        """Write the base with the student merged into its weights, and the student's sampler: no LoRA is left.

        `TDMPipeline.from_pretrained` reads the folder, and so does a plain `DiffusionPipeline.from_pretrained` where
        this package is installed, with the trained timesteps in its scheduler. The merge is permanent: the folder
        has no teacher, and it takes no other student. This pipeline stays as it is. The folder appears whole or not at
        all.

        Args:
            save_directory, force, kwargs: as in `save_pretrained`.

        Raises:
            TDMError: as in `save_pretrained`; a quantised base; or another sampler than `TDMScheduler`.

        >>> from tdm import TDMPipeline
        >>> TDMPipeline.from_pretrained().save_merged("merged")
        >>> TDMPipeline.from_pretrained("merged").recipe.default_steps
        4
        """
        if not isinstance(self._sampler, TDMScheduler):
            raise TDMError(f"merging is for TDMScheduler: a folder cannot hold the grid of {self.recipe.sampler}")
        with whole_folder(save_directory, force=force) as unfinished:
            self._save_networks(str(unfinished), self._sampler, merged=True, **kwargs)
            (unfinished / MERGED_FILE).write_text(self.recipe.to_metadata()[HEADER_KEY], encoding="utf-8")

    def _save_networks(self, folder: str, scheduler: Any, *, merged: bool, **kwargs: Any) -> Layers:
        """Save all but the student, or with it in the weights; returns the student."""
        if kwargs.pop("push_to_hub", False):
            raise TDMError("push_to_hub is not supported here: save the folder, then upload it")
        call = "save_merged" if merged else "save_pretrained"
        require_wide(self._modules(), f"call {call} before enable_layerwise_casting")
        remedy = f"from_pretrained(base, student=..., {self.family.denoiser}=...)"
        require_no_gguf(self._modules(), f"which cannot be written; keep the .gguf file, and load it with {remedy}")
        student = {} if merged and self._whole else self._only_student()
        before, self.scheduler = self.scheduler, scheduler
        try:
            with contextlib.ExitStack() as hidden:
                for component in student:
                    hidden.enter_context(adapters_hidden(self._adaptable()[component], STUDENT_ADAPTER, merged=merged))
                super().save_pretrained(folder, **kwargs)
        finally:
            self.scheduler = before
        return student

    def _only_student(self) -> Layers:
        """The student's LoRA, if the pipeline holds no other adapter."""
        self.require_unfused()
        attached = {name for module in self._modules() for name in getattr(module, "peft_config", {})}
        if other := attached - {STUDENT_ADAPTER}:
            raise TDMError(f"adapters {sorted(other)} cannot be saved with a student; delete_adapters first")
        loras = {name: lora_of(network, STUDENT_ADAPTER) for name, network in self._adaptable().items()}
        student = {name: layers for name, layers in loras.items() if layers}
        if not student:
            raise TDMError("the student is no longer loaded as an adapter; call load_student before saving")
        return student

    @property
    def _whole(self) -> bool:
        """Whether the student is in the weights and nothing is attached to them."""
        return STUDENT_ADAPTER in self.fused_loras and not any(tuner_layers(module) for module in self._modules())
