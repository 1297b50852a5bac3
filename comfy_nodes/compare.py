"""Teacher and student from the same noise: both pictures, and what each of them took."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io, ui
from comfy_extras import nodes_custom_sampler as core
from nodes import VAEDecode
from torch import Tensor

from ..errors import TDMError


class TDMCompare(io.ComfyNode):
    """A node that samples a guided teacher next to its student."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMCompare",
            display_name="TDM Compare",
            category="model/sampling/TDM",
            description="Samples the teacher and its student from the same noise, and shows how many network calls and "
            "seconds each of them took.",
            search_aliases=["compare", "benchmark", "teacher and student", "side by side", "speed", "A/B"],
            inputs=[
                io.Model.Input("teacher", tooltip="The base, as its loader gives it."),
                io.Model.Input("student", tooltip="The same base with the student, from TDM Sigmas."),
                io.Conditioning.Input("positive", tooltip="The prompt, for both."),
                io.Conditioning.Input("negative", tooltip="What the teacher's guidance leads away from."),
                io.Vae.Input("vae", tooltip="Decodes both pictures."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the pictures' size, or one to redraw."),
                io.Sampler.Input("student_sampler", tooltip="From TDM Sampler."),
                io.Sigmas.Input("student_sigmas", tooltip="From TDM Sigmas."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise, which is the same for both.",
                ),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="The teacher's steps."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The teacher's guidance. Each of its steps calls the network twice, unless this is 1.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="The teacher's sampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="normal",
                    tooltip="How the teacher's steps are spaced.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The teacher's; below 1 to redraw a latent, the same as in TDM Sigmas.",
                ),
                io.Float.Input(
                    "student_cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The student's guidance: 1, which is none, unless its recipe says another.",
                    advanced=True,
                ),
            ],
            has_intermediate_output=True,  # shows its text also when it comes from the cache
            outputs=[
                io.Image.Output("teacher_image", display_name="teacher", tooltip="The teacher's pictures."),
                io.Image.Output("student_image", display_name="student", tooltip="The student's pictures."),
                io.Image.Output("both", tooltip="The teacher's on the left, the student's on the right."),
                io.String.Output("report", tooltip="Network calls and seconds of both."),
            ],
        )

    @classmethod
    def execute(
        cls,
        teacher: Any,
        student: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        latent_image: dict[str, Any],
        student_sampler: Any,
        student_sigmas: Tensor,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        student_cfg: float,
    ) -> io.NodeOutput:
        """(IMAGE of the teacher, IMAGE of the student, both side by side, report).

        Raises:
            TDMError: the two models are not of one kind, or the student's sampler refuses its MODEL and SIGMAS.
        """
        if type(teacher.model) is not type(student.model):
            kinds = f"a {type(teacher.model).__name__} and a {type(student.model).__name__}"
            raise TDMError(f"teacher and student must be of one base; these are {kinds}")
        noise = core.Noise_RandomNoise(seed)
        sampler = comfy.samplers.sampler_object(sampler_name)
        sigmas = core.BasicScheduler.execute(teacher, scheduler, steps, denoise)[0]
        images, lines = [], []
        for name, model, guidance, how in (
            ("teacher", teacher, cfg, (sampler, sigmas)),
            ("student", student, student_cfg, (student_sampler, student_sigmas)),
        ):
            meter = _Meter()
            guider = core.CFGGuider.execute(meter.on(model), positive, negative, guidance)[0]
            latent = core.SamplerCustomAdvanced.execute(noise, guider, *how, latent_image)[0]
            lines.append(f"{name}: {meter.report()}")
            images.append(VAEDecode().decode(vae, latent)[0])
        text = "\n".join(lines)
        return io.NodeOutput(*images, torch.cat(images, dim=2), text, ui=ui.PreviewText(text))


class _Meter:
    """A counter of what one sampling takes, by ComfyUI's hooks around its sampler and its network."""

    def __init__(self) -> None:
        self.pictures = self.samples = 0
        self.seconds = 0.0

    def on(self, model: Any) -> Any:
        """A MODEL that is measured: without the loading of its weights, which is not the sampler's."""
        measured = model.clone()
        measured.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "tdm_compare", self._sampler)
        measured.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tdm_compare", self._network)
        return measured

    def report(self) -> str:
        """Network calls and seconds, for humans: those of one picture, where there are several."""
        each = " per picture" if self.pictures > 1 else ""
        calls, seconds = self.samples / self.pictures, self.seconds / self.pictures
        return f"{calls:g} network calls, {seconds:.2f} s{each}"

    def _sampler(self, sampler: Any, *inputs: Any) -> Tensor:
        comfy.model_management.synchronize()
        begun = time.perf_counter()
        samples = sampler(*inputs)
        comfy.model_management.synchronize()
        self.seconds, self.pictures = time.perf_counter() - begun, len(samples)
        return samples

    def _network(self, network: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        self.samples += len(x)  # prompt and negative prompt of a picture may be of one batch, or of two
        return network(x, *rest, **options)
