"""`TDMPipeline`: a stock diffusers pipeline with a few-step student in it, and its teacher one context away."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..errors import BaseNotFoundError, TDMError
from .attention import use_attention
from .base_first import base_first
from .base_weights import components
from .bases import BUNDLED, Source, base_folder, family_of_base, teacher_call
from .explicit_sigmas import sigmas_of
from .families import Family, TeacherCall, family_of_pipeline
from .family_class import forget_output_capture, from_pipe, on_family, unpickled
from .finite import finite_output
from .fresh_noise import noise_of
from .guidance import guidance_of_teacher, warn_of_guidance, zero_star_of_teacher
from .image_to_image import image_to_image
from .loras.adapters import adapters_off, require_wide
from .scheduler import TDMScheduler
from .stream import Step, stream
from .students.adapter import STUDENT_ADAPTER
from .students.file import MERGED_FILE, Student, read_merged
from .students.locate import locate, student_file
from .students.recipe import StudentRecipe, completed
from .students.recipe_on_base import recipe_on_base
from .students.saving import StudentSaving
from .students.unplaced import Unplaced, unplaced
from .turns import Turns

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
_logger = logging.getLogger(__name__)


class TDMPipeline(StudentSaving):
    """A few-step student, ready to call. Build one with `TDMPipeline.from_pretrained`.

    The object is an instance of the base's own pipeline class (`isinstance(pipe, StableDiffusionXLPipeline)`), with
    every method of it. What is added: the student's LoRA as the adapter "student", a `TDMScheduler` with its trained
    timesteps (or the sampler of a student of another method), and the student's step count, guidance and size as
    defaults of the call.

        >>> from tdm import TDMPipeline
        >>> pipe = TDMPipeline.from_pretrained()  # the bundled model; or a student file, with dtype=, then .to("cuda")
        >>> pipe("a red star at night", generator=torch.Generator().manual_seed(0)).images[0].size
        (64, 64)

    Attributes:
        recipe: how the loaded student is run.
    """

    base_model: str
    _first_by_base = False
    _warned: set[Any]  # the guidance that calls were warned of

    if TYPE_CHECKING:  # the class that `from_pretrained` gives has the family's own, with the student's defaults

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base_or_student: Source | Student = BUNDLED,
        *,
        student: Source | Student | None = None,
        recipe: Mapping[str, Any] | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> TDMPipeline:
        """Load a base and its student.

        Args:
            base_or_student: a student (`Student`, file, or a folder or hub repository with `student.safetensors`) whose
                metadata names its base; a released student by its repository id alone (see `students/released.py`); a
                folder written by `save_pretrained` or `save_merged`; or, with `student`, a base. The default is the
                small model that ships with this package.
            student: the student for the base: `Student`, file, folder or hub repository.
            recipe: fields of `StudentRecipe` that complete or replace the student's metadata. `base_model`, `family`
                and `prediction_type` need not be given: the base itself says them.
            strict: False: what of the LoRA has no place on the base is left out, with a warning.
            dtype, torch_dtype: two spellings of one argument, the dtype of the weights; float32 if not given.
            kwargs: anything else that the stock `from_pretrained` takes, such as `variant` or whole components.

        Raises:
            TDMError: no student or no base there; metadata that is missing (all is listed) or wrong; a student of
                another family or prediction type; LoRA layers that do not fit the base; NaN; an unsupported base.

        >>> pipe = TDMPipeline.from_pretrained("bundled", recipe={"trained_timesteps": {2: [1000, 500]}})
        >>> type(pipe).__name__, type(pipe.scheduler).__name__, pipe.recipe.default_steps
        ('PixArtAlphaPipeline', 'TDMScheduler', 2)
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise TDMError(f"dtype={dtype} and torch_dtype={torch_dtype} contradict each other; pass one of them")
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        base, source = locate(base_or_student, student, hub)
        if isinstance(source, Path) and source.name == MERGED_FILE:
            new, fields = None, completed(read_merged(source), recipe)
        else:
            new = unplaced(source, recipe, strict=strict)
            fields = new.fields
        named_base, base = base, base or fields.get("base_model")
        if not base:
            raise TDMError(f"{source} does not name its base; pass it: from_pretrained(base, student=...)")
        folder = base_folder(base)

        # A wrong pair is refused here, before gigabytes are read.
        if "revision" in kwargs:
            hub["revision"] = kwargs["revision"]
        try:
            family = family_of_base(folder, **hub)
        except BaseNotFoundError as error:
            reason = error.reason + ("" if named_base else _relative(base))
            raise BaseNotFoundError(reason, "pass one: from_pretrained(base, student=...)") from None
        if kwargs.get("scheduler") is not None:
            config = kwargs["scheduler"].config
        else:
            config = TDMScheduler.load_config(folder, subfolder="scheduler", **hub)
        complete, sampler = recipe_on_base(base, family, config, fields)

        loader: Any = super(TDMPipeline, on_family(TDMPipeline, family))
        # Without a dtype, diffusers loads float32, but transformers the dtype that its weights are stored in.
        dtype = dtype or torch_dtype or torch.float32
        pipe = loader.from_pretrained(folder, dtype=dtype, **{**components(folder, kwargs, dtype), **kwargs})
        pipe._set_base(base, family)
        if new is None:
            pipe._is_student(complete, sampler)
        else:
            pipe._put_in(new, complete, sampler)
        return pipe

    @classmethod
    def from_pipe(  # type: ignore[override]
        cls,
        pipeline: DiffusionPipeline,
        *,
        student: Source | Student | None,
        recipe: Mapping[str, Any] | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> TDMPipeline:
        """Put a student on a pipeline that is loaded already, such as a fine-tune that came as a single file.

        The networks are shared, not copied, and have the student's adapter from then on: go on with what is returned.

        Args:
            pipeline: a stock pipeline of a supported family.
            student: as in `load_student`; None: the pipeline's own weights are the student's, and `recipe` says all.
            recipe: fields that complete or replace the student's metadata.
            strict: as in `from_pretrained`.
            kwargs: what the stock `from_pipe` takes; the dtype stays unless `dtype` is given.

        Raises:
            TDMError: an unsupported pipeline, one that has a student, or as in `load_student`.

        >>> from diffusers import PixArtAlphaPipeline
        >>> from tdm.pipelines.bases import bundled_path
        >>> base = PixArtAlphaPipeline.from_pretrained(bundled_path() / "teacher")
        >>> TDMPipeline.from_pipe(base, student="bundled").recipe.default_steps
        4
        """
        if isinstance(pipeline, TDMPipeline):
            raise TDMError("this pipeline has a student already; put another one in with load_student")
        family = family_of_pipeline(type(pipeline).__name__)
        # The denoiser by name: its class may be one of ours, which diffusers would not take over.
        network: dict[str, Any] = {family.denoiser: getattr(pipeline, family.denoiser)}
        pipe = from_pipe(TDMPipeline, on_family(TDMPipeline, family), pipeline, {**network, **kwargs})
        base = pipeline.config.get("_name_or_path") or type(pipeline).__name__
        pipe._set_base(base, family)
        if student is None:
            pipe._is_student(*recipe_on_base(base, family, pipe.scheduler.config, recipe or {}))
        else:
            pipe.load_student(student, recipe=recipe, strict=strict)
        return pipe

    def load_student(
        self, student: Source | Student, *, recipe: Mapping[str, Any] | None = None, strict: bool = True
    ) -> None:
        """Put a student into the pipeline, in the place of the one it has. Other adapters stay as they are.

        Args:
            student: `Student`, file (a LoRA of any layout), folder with `student.safetensors`, or hub repository.
            recipe: fields that complete or replace its metadata.
            strict: as in `from_pretrained`.

        Raises:
            TDMError: as in `from_pretrained`, or adapters are fused, or layerwise casting is on; the pipeline is then
                left as it was.

        >>> pipe = TDMPipeline.from_pretrained()
        >>> pipe.save_pretrained("model")
        >>> pipe.load_student("model/student.safetensors", recipe={"solver_order": 2})
        >>> pipe.scheduler.config.solver_order, pipe.get_active_adapters()
        (2, ['student'])
        """
        source = student if isinstance(student, Student) else student_file(student, {})
        new = unplaced(source, recipe, strict=strict)
        config = self.teacher_scheduler.config
        self._put_in(new, *recipe_on_base(self.base_model, self.family, config, new.fields))

    def _set_base(self, base: str, family: Family) -> None:
        """The base of a pipeline that was just built."""
        if getattr(self, family.denoiser) is None:
            raise TDMError(
                f"{family.denoiser}=None leaves a student no network to be put in; to encode prompts alone, load the "
                f"base with diffusers' {family.pipeline}"
            )
        self.family, self.base_model, self.teacher_scheduler, self.turns = family, base, self.scheduler, Turns()

    def _put_in(self, new: Unplaced, recipe: StudentRecipe, sampler: Any) -> None:
        placed = new.place(self.family, self._adaptable())
        require_wide((self._adaptable()[name] for name in placed), "call enable_layerwise_casting after load_student")
        with self.turns.turn():
            self.require_unfused()
            self._replace_student(placed)
            self._sample_as(recipe, sampler)
        count = sum(map(len, placed.values()))
        _logger.info("%s: all %d LoRA layers match the %s", new.name, count, " and the ".join(placed))

    def _is_student(self, recipe: StudentRecipe, sampler: Any) -> None:
        """The weights themselves are the student's, as after `fuse_lora`: there is nothing to attach."""
        self._merged_adapters = {STUDENT_ADAPTER}
        self._sample_as(recipe, sampler)

    def _sample_as(self, recipe: StudentRecipe, sampler: Any) -> None:
        self.scheduler = self._sampler = sampler
        self.recipe, self._warned = recipe, set()

    def image_to_image(self, prompt: str | list[str] | None, image: Any, strength: float = 0.6, **call: Any) -> Any:
        """Redraw a picture: start from it, noised to the trained timestep nearest to `strength`, and end on the grid.

        Args:
            prompt: as in a call.
            image: PIL image, path, array [H, W, 3] or tensor [3, H, W], a batch or a list of them; one for each prompt,
                or one for all. uint8, or floats in [0, 1] (see `pictures.py`). Its own size is used, cut down to what
                the model works in, unless `height` and `width` are given.
            strength: above 0 (close to the picture) to 1 (free of it), as a share of the noise schedule. A student of 4
                steps has 4 of them; the nearest is taken, and as many network calls are made as steps are left.
            call: other arguments of a call; `num_inference_steps` names the trained grid.

        Returns:
            What the pipeline returns.

        Raises:
            TDMError: a strength out of range, a size that does not fit, numbers that are no picture, a family of
                videos, `sigmas` or `timesteps`, or another sampler than `TDMScheduler` (as in `teacher`).
        """
        with self.turns.turn():
            return image_to_image(self, image, strength, {"prompt": prompt, **call})

    def stream(self, *args: Any, **kwargs: Any) -> Generator[Step, None, None]:
        """A call that can be watched and stopped: what `pipe(...)` takes, step by step.

            for step in pipe.stream("a red cube"):
                show(step.output.images[0] if step.output else step.preview[0])

        Yields a `Step` after each step, then one more with the call's own output, which is bit for bit that of
        `pipe(...)`. Nothing runs until the first item is asked for, nor between two of them. Leaving the loop,
        `close()` and dropping the generator stop the run, within the step in flight. One run at a time: another call
        of the pipeline in between would mix up both.

        Raises:
            Exception: whatever `pipe(...)` raises, from the item at which it happens.
        """
        return stream(self, args, kwargs)

    @property
    def teacher_call(self) -> TeacherCall:
        """The steps and the guidance scale of a call in `teacher()`.

        >>> TDMPipeline.from_pretrained().teacher_call
        TeacherCall(steps=50, guidance_scale=3.0)
        """
        return teacher_call(self.base_model, self.family, self.config)

    @contextlib.contextmanager
    def teacher(self) -> Iterator[Self]:
        """The teacher, for the length of a `with`: all adapters off, the base's own scheduler, steps and guidance.

        A call in the block is guided in the family's way: with the scale and the steps of `teacher_call`, with the
        negative prompt and the normalisation that the student was distilled with, and with an empty prompt where that
        is what switches guidance on (Qwen-Image). An argument that the caller gives wins. The size stays the student's,
        so that one seed gives pictures to lay side by side. The student is back after the block, whatever happened in
        it.

        Raises:
            TDMError: adapters are fused into the weights, so that they cannot be switched off.

        >>> pipe = TDMPipeline.from_pretrained()
        >>> with pipe.teacher():
        ...     picture = pipe("a red star").images[0]
        ...     faster = pipe("a red star", num_inference_steps=10).images[0]
        ...     print(type(pipe.scheduler).__name__)
        DPMSolverMultistepScheduler
        """
        self.require_unfused()
        scheduler, teaching = self.scheduler, self._teaching
        with adapters_off(self._modules()):
            try:
                self.scheduler, self._teaching = self.teacher_scheduler, True
                yield self
            finally:
                self.scheduler, self._teaching = scheduler, teaching

    @contextlib.contextmanager
    def base_first(self) -> Iterator[Self]:
        """The base makes the first step of each run, the student the others, for the length of a `with`.

        More of the base's variety over seeds comes through, for some of the student's accuracy. Grid, scheduler and
        number of network calls stay. LoRAs of the user are on in every step; the prompt is encoded once, with the text
        encoders as they are. It holds for calls, streams and `image_to_image`, where the first step is the first of
        those that are left; `teacher()` is not concerned.

        Raises:
            TDMError: adapters are fused into the weights, so that the student cannot be switched off; from a call: it
                has only one step.

        >>> pipe = TDMPipeline.from_pretrained()
        >>> with pipe.base_first():
        ...     picture = pipe("a red star", generator=torch.Generator().manual_seed(0)).images[0]
        """
        self.require_unfused()
        before, self._first_by_base = self._first_by_base, True
        try:
            yield self
        finally:
            self._first_by_base = before

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made for the family, and no name leads to it.
        for module in self._modules():
            forget_output_capture(module)
        return unpickled, (TDMPipeline, self.family.pipeline), {k: v for k, v in vars(self).items() if k != "family"}

    def use_attention(self, backend: str | None = None) -> str:
        """Switch the denoiser's attention to a backend of diffusers, or to the best that works here.

        Args:
            backend: "native" (torch's SDPA), "xformers", "flash", "sage", ...; None for the best. See `attention.py`.

        Returns:
            The name of what it got.

        Raises:
            TDMError: the named backend does not work here; the message says why and which ones do. Nothing has changed.

        >>> TDMPipeline.from_pretrained().use_attention("native")
        'native'
        """
        return use_attention(self.denoiser, backend, self._execution_device)

    def run(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a call of the stock pipeline, which is given as `call`, with this pipeline's defaults and switches.

        Raises:
            TDMError: what is drawn is not finite.
        """
        bound = self.bind_call(args, kwargs)
        drawer = "the base" if self._teaching else "the student on this base"
        with self.turns.call():
            self.check_student()
            if not self._teaching and (self.scheduler is self._sampler or isinstance(self.scheduler, TDMScheduler)):
                warn_of_guidance(self.family, self.recipe, bound, self._warned)
            teacher = zero_star_of_teacher(self, bound) if self._teaching else contextlib.nullcontext()
            with (
                sigmas_of(self, bound.arguments),
                noise_of(self, bound),
                teacher,
                finite_output(self, drawer) as checked,
            ):
                if self._first_by_base and not self._teaching:
                    return checked(base_first(self, call, bound))
                return checked(call(*bound.args, **bound.kwargs))

    def bind_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments of a call by name, completed with the defaults."""
        signature = inspect.signature(type(self).__call__)
        bound = signature.bind_partial(self, *args, **kwargs)
        for argument, value in self.call_defaults().items():
            if argument in signature.parameters and bound.arguments.get(argument) is None:
                bound.arguments[argument] = value
        if self._teaching:
            bound.arguments.update(guidance_of_teacher(self.recipe, bound))
        bound.arguments.update(self.family.negative_prompt(bound.arguments))
        return bound

    def call_defaults(self) -> dict[str, Any]:
        """What a call uses for arguments that were left out or given as None."""
        recipe = self.recipe
        defaults = {**self.family.call_defaults(self), "height": recipe.height, "width": recipe.width}
        if recipe.num_frames is not None:
            defaults["num_frames"] = recipe.num_frames
        steps, scale = self.teacher_call if self._teaching else (recipe.default_steps, recipe.guidance_scale)
        defaults |= {"num_inference_steps": steps, **self.family.guidance(scale)}
        if recipe.sampler is not None and not self._teaching:
            defaults["eta"] = recipe.sampler.eta
        return defaults


def _relative(base: str) -> str:
    """What to say of a base that a student names by something else than a whole path."""
    if Path(base).is_absolute():
        return "; the student's file names it"
    return "; the student's file names it, a hub id or a folder relative to where the student was trained"
