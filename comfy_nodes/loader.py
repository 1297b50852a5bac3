"""A student's LoRA on any MODEL, and CLIP: converted to names that ComfyUI loads, and counted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import comfy.lora
import comfy.model_base
import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor, nn

from ..errors import PartialLoraError, TDMError
from ..pipelines.families import Family, family_of_name
from ..pipelines.loras.file import LoraFile, read_lora_file
from ..pipelines.loras.pairs import state_dict_of
from ..pipelines.students.recipe import HEADER_KEY, StudentRecipe
from ..pipelines.students.released import PRESETS, Preset, known_of
from .bridge import DiffusersModel, TextEncoders
from .students import BUNDLED, RELEASED, file_stamp, lora_path

BY_ITSELF = "by its header or name"

_FAMILIES = {  # ComfyUI's `image_model`; its older networks have none
    "pixart_alpha": "pixart",
    "pixart_sigma": "pixart",
    "cogvideox": "cogvideox",
    "flux": "flux",
    "wan2.1": "wan",
    "lumina2": "zimage",
    "qwen_image": "qwenimage",
    "krea2": "krea2",
}
_ENCODERS = ("clip_l", "clip_h", "clip_g", "t5xxl")  # as diffusers counts them: text_encoder, text_encoder_2, ...


class TDMLoadStudent(io.ComfyNode):
    """A student of `models/loras` on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMLoadStudent",
            display_name="Load TDM Student",
            category="model/sampling/TDM",
            description="Loads a TDM student, or any other LoRA in the layout of diffusers, PEFT, kohya or the "
            "original checkpoints, at the strength it was trained for. Every layer must find its place, unless strict "
            "is off.",
            search_aliases=["LoRA loader", "trajectory distribution matching", "few-step", "distilled", "LoRA"],
            inputs=[
                io.Model.Input("model", tooltip="The student's base, or a fine-tune of it; from any loader."),
                io.Combo.Input(
                    "file",
                    options=[BUNDLED, *folder_paths.get_filename_list("loras")],
                    tooltip=f"The file, in models/loras; '{BUNDLED}' is the student that comes with TDM.",
                ),
                io.Combo.Input(
                    "released_as",
                    options=[BY_ITSELF, *RELEASED],
                    tooltip="For a released student whose file was renamed: which one it is. Its strength, and the "
                    "layers of a list without names, follow from that.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 is what the student was trained for. On a fine-tune of its base 0.5 to 0.75 can look "
                    "better.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Needed if the student has layers in a text encoder."),
                io.Boolean.Input(
                    "strict",
                    default=True,
                    optional=True,  # prompts that were saved without it go on
                    tooltip="On: a file that does not fit as a whole is refused. Off: what has no place or is no LoRA, "
                    "such as a change of biases, is left out, and the node says what.",
                ),
            ],
            has_intermediate_output=True,  # shows its text also when it comes from the cache
            outputs=[
                io.Model.Output(tooltip="The model with the student."),
                io.Clip.Output(tooltip="The CLIP with the student's layers in it, if it has any."),
                io.String.Output("recipe", tooltip="How the student is run, as JSON; empty if the file does not say."),
                io.String.Output("report", tooltip="What the node shows: the layers that matched, and the recipe."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        """The state of the file: a student that was trained further is loaded again."""
        return file_stamp(file)

    @classmethod
    def execute(
        cls, model: Any, file: str, released_as: str, strength: float, clip: Any = None, strict: bool = True
    ) -> io.NodeOutput:
        """(MODEL, CLIP, recipe, report).

        Raises:
            TDMError: the file is no LoRA or damaged, or holds NaN; it is for another family or another network; a list
                without names that is no released student; diffusers or peft is missing.
            PartialLoraError: with `strict`, a layer has no place, such as one of a text encoder without a CLIP, or the
                file has more in it than a LoRA.
        """
        try:
            from ..pipelines.loras.native import place_native  # imports diffusers: not for the start of a server
            from ..pipelines.loras.places import place
        except ImportError as error:
            raise TDMError(f"Load TDM Student needs diffusers and peft (pip install diffusers peft): {error}") from None
        lora = read_lora_file(lora_path(file))
        recipe, preset = _recipe_of(lora, released_as)
        family = family_of(model)
        if recipe is not None and recipe.family != family.name:
            raise TDMError(f"{file} is a student of {recipe.base_model} ({recipe.family}); this MODEL is {family.name}")
        named_networks = {
            family.denoiser: denoiser_of(model.model),
            **encoders_of(getattr(clip, "cond_stage_model", None)),
        }
        networks = {component: network for component, (_, network) in named_networks.items()}
        put = place if isinstance(model.model, DiffusersModel) else place_native
        with collecting_left_out() as left_out:
            placed = put(lora, family, networks, strict=strict, **(preset.placing if preset else {}))
        tensors = {
            component: {
                f"{named_networks[component][0]}.{key}": tensor for key, tensor in state_dict_of(layers).items()
            }
            for component, layers in placed.items()
        }
        denoiser_tensors = tensors.pop(family.denoiser, {})
        encoder_tensors = {key: tensor for each in tensors.values() for key, tensor in each.items()}
        if denoiser_tensors:
            model = _patched(model, dict(comfy.lora.model_lora_keys_unet(model.model, {})), denoiser_tensors, strength)
        if encoder_tensors:
            clip = _patched(
                clip, dict(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})), encoder_tensors, strength
            )
        left_out = [line.replace(str(lora.path), file) for line in left_out]
        text = _report(len(denoiser_tensors) // 2, len(encoder_tensors) // 2, recipe, left_out)
        known = recipe.to_metadata()[HEADER_KEY] if recipe else ""
        return io.NodeOutput(model, clip, known, text, ui=ui.PreviewText(text))


@contextlib.contextmanager
def collecting_left_out() -> Iterator[list[str]]:
    """For a `with` that puts a LoRA onto networks: what it leaves out, as lines of text, once it is over.

    Raises:
        PartialLoraError: as in the `with`, with the switch of Load TDM Student as the remedy.
    """
    left_out: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield left_out
        except PartialLoraError as error:
            raise PartialLoraError(
                error.reason, "with strict off, Load TDM Student leaves out what does not fit and loads the rest"
            ) from None
    left_out += [str(warning.message) for warning in caught]


def family_of(model: Any) -> Family:
    """The family of a MODEL's network.

    Raises:
        TDMError: there are no students of it.
    """
    family = known_family_of(model)
    if family is None:
        known = ", ".join(["sd15", "sdxl", "sd3", *sorted(set(_FAMILIES.values()))])
        raise TDMError(f"this MODEL is a {type(model.model).__name__}; students can be for {known}")
    return family


def known_family_of(model: Any) -> Family | None:
    """The family of a MODEL's network; None if there are no students of it."""
    if isinstance(model.model, DiffusersModel):
        return model.model.family
    config, kind = model.model.model_config.unet_config, type(model.model)
    if issubclass(kind, comfy.model_base.SD3):
        return family_of_name("sd3")
    if issubclass(kind, comfy.model_base.SDXL):
        return family_of_name("sdxl")
    if "model_channels" in config:
        return family_of_name("sd15")
    if config.get("image_model") in _FAMILIES:
        return family_of_name(_FAMILIES[config["image_model"]])
    return None


def _recipe_of(lora: LoraFile, released_as: str) -> tuple[StudentRecipe | None, Preset | None]:
    """(recipe, preset) of a file; None where it has none.

    Raises:
        TDMError: it is said to be a released student, but carries a recipe of its own, or one that is not valid.
    """
    fields, preset = known_of(lora)
    if released_as != BY_ITSELF:
        if fields and preset is None:
            raise TDMError(f"{lora.path.name} has a recipe of its own; set released_as to '{BY_ITSELF}'")
        preset = PRESETS[released_as]
        fields = preset.fields
    return (StudentRecipe.from_fields(fields) if fields else None), preset


def denoiser_of(model: Any) -> tuple[str, nn.Module]:
    """(what its layers' names begin with in ComfyUI, network) of a MODEL's BaseModel."""
    network = model.diffusion_model
    if isinstance(model, DiffusersModel):
        return "diffusion_model.network", network.network
    return "diffusion_model", network


def encoders_of(model: Any) -> dict[str, tuple[str, nn.Module]]:
    """Component of diffusers -> (what its layers' names begin with in ComfyUI, network) of the text encoders of a
    CLIP's `cond_stage_model`; none of None.
    """
    if isinstance(model, TextEncoders):
        return {name: (f"text_encoders.{name}", e) for name, e in model.named_children()}
    there = [name for name in _ENCODERS if hasattr(model, name)]
    components = zip(("text_encoder", "text_encoder_2", "text_encoder_3"), there, strict=False)
    encoders = {component: (name, getattr(model, name)) for component, name in components}
    return {
        component: (f"text_encoders.{name}.transformer", e.transformer)
        for component, (name, e) in encoders.items()
        if e is not None
    }


def _patched(patcher: Any, keys: dict[str, Any], tensors: dict[str, Tensor], strength: float) -> Any:
    """A MODEL or CLIP with a LoRA in the names of ComfyUI; `keys` is core's table of them.

    Raises:
        TDMError: ComfyUI leaves some of it out, which it would only log.
    """
    patches = comfy.lora.load_lora(tensors, keys)
    patched = patcher.clone()
    taken = len(set(patched.add_patches(patches, strength)))
    if 2 * taken != len(tensors):
        raise TDMError(
            f"this ComfyUI takes {taken} of the {len(tensors) // 2} LoRA layers; it has other names for them"
        )
    return patched


def _report(layers: int, encoder_layers: int, recipe: StudentRecipe | None, left_out: list[str]) -> str:
    """Describe what was loaded, and what was not, for the text on the node."""
    text = f"{layers} layers matched" + ("" if left_out else ", 0 unmatched")
    text = "\n".join([text + (f" ({encoder_layers} more in CLIP)" if encoder_layers else ""), *left_out])
    if recipe is None:
        return f"{text}\nno recipe in the file: choose released_as, or type the timesteps into TDM Sigmas"
    grids = {k: ", ".join(f"{t:.4g}" for t in grid) for k, grid in recipe.trained_timesteps.items()}
    several = [f"{k} step{'s' * (k > 1)}: {grid}" for k, grid in grids.items()]
    size = f"{recipe.width} x {recipe.height}" + (f", {recipe.num_frames} frames" if recipe.num_frames else "")
    noise = "fresh noise" if recipe.eta == 1 else f"noise of eta {recipe.eta:g}"
    sampling = f"{noise} at each step" if recipe.stochastic_sampling else f"order {recipe.solver_order}"
    sampler = sampling if recipe.sampler is None else str(recipe.sampler)
    steps = several if len(several) > 1 else [f"timesteps {grid}" for grid in grids.values()]
    lines = [text, f"student of {recipe.base_model}", *steps]
    return "\n".join([*lines, f"{sampler}, guidance {recipe.guidance_scale:g}, {size}"])
