"""Core's own nodes on what Load Diffusers Pipeline gives: they work, or say in one line that they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tdm.pipelines.families import family_of_pipeline
from tdm.pipelines.loras.layer_names import layer_shapes
from tdm.pipelines.loras.pairs import Lora, kohya_state_dict_of, state_dict_of
from tdm.tests import tiny
from torch import Tensor

from .graphs import node
from .server import Graph, PromptError, Server
from .test_bridge import Folder, loaded, stock
from .test_sampling import error

BY_ITSELF = "by its header or name"


def lora_of(pipe: Any, components: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Lora]]:
    """A random LoRA on the layers of components that end in these."""
    generator = torch.Generator().manual_seed(1)

    def pair(shape: Any) -> Lora:
        a = torch.randn(2, shape.inputs, *shape.kernel, generator=generator) * 0.3
        return Lora(a, torch.randn(shape.outputs, 2, *[1] * len(shape.kernel), generator=generator) * 0.3)

    return {
        component: {n: pair(s) for n, s in layer_shapes(getattr(pipe, component)).items() if n.endswith(ends)}
        for component, ends in components.items()
    }


def written(layout: str, lora: dict[str, dict[str, Lora]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for component, layers in lora.items():
        if layout == "kohya":
            tensors |= kohya_state_dict_of(component, layers)
        else:
            tensors |= {f"{component}.{key}": tensor for key, tensor in state_dict_of(layers).items()}
    return tensors


def styled(loader: str, file: str, name: str, seed: int) -> Graph:
    graph = loaded(name, seed=seed)
    core = {"lora_name": file, "strength_model": 0.7}
    ours = {"file": file, "released_as": BY_ITSELF, "strength": 0.7}
    links: dict[str, Any] = {"model": ["load", 0], **(ours if loader == "TDMLoadStudent" else core)}
    if loader != "LoraLoaderModelOnly":
        links["clip"] = ["load", 1]
        graph["prompt"]["inputs"]["clip"] = ["style", 1]
    if loader == "LoraLoader":
        links["strength_clip"] = 0.7
    graph["style"] = node(loader, **links)
    graph["sigmas"]["inputs"]["model"] = ["style", 0]
    return graph


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("sd15", {"unet": ("to_q", "conv1"), "text_encoder": ("q_proj",)}),
        ("pixart", {"transformer": ("to_q", "to_v")}),
        ("flux", {"transformer": ("to_q", "to_add_out")}),
    ],
)
def test_cores_lora_loaders_load_what_ours_loads(
    server: Server, folder: Folder, name: str, components: dict[str, tuple[str, ...]], layout: str
) -> None:
    folder(name)
    (server.models / "loras").mkdir(exist_ok=True)
    lora = lora_of(tiny.build(name), components)
    file = f"style_{name}_{layout}.safetensors"
    save_file(written(layout, lora), server.models / "loras" / file)
    (plain,) = server.latents(loaded(name), ["samples", 0])
    (expected,) = server.latents(styled("TDMLoadStudent", file, name, 7), ["samples", 0])
    (actual,) = server.latents(styled("LoraLoader", file, name, 7), ["samples", 0])
    assert error(actual, expected) <= 1e-6
    assert error(expected, plain) > 1e-3
    (model_only,) = server.latents(styled("LoraLoaderModelOnly", file, name, 7), ["samples", 0])
    if "text_encoder" in components:
        assert error(model_only, expected) > 1e-4  # it has no CLIP to load onto
        assert error(model_only, plain) > 1e-3
    else:
        assert error(model_only, expected) <= 1e-6


def test_a_lora_that_does_not_fit_is_one_line_in_cores_loader(server: Server, folder: Folder) -> None:
    folder("pixart")
    layers = lora_of(tiny.build("pixart"), {"transformer": ("to_q",)})
    layers["transformer"]["some.layer"] = Lora(*(t.clone() for t in next(iter(layers["transformer"].values()))))
    (server.models / "loras").mkdir(exist_ok=True)
    save_file(written("diffusers", layers), server.models / "loras" / "wrong.safetensors")
    with pytest.raises(PromptError, match=r"1 do not: transformer.some.layer \(no such layer\)"):
        server.latents(styled("LoraLoaderModelOnly", "wrong.safetensors", "pixart", 7), ["samples", 0])
    del layers["transformer"]["some.layer"]
    biases = written("diffusers", layers) | {"diffusion_model.proj_out.diff_b": torch.ones(32)}
    save_file(biases, server.models / "loras" / "biases.safetensors")
    with pytest.raises(PromptError, match=r"a change of biases next to the LoRA.*; with strict off, Load TDM Student"):
        server.latents(styled("LoraLoaderModelOnly", "biases.safetensors", "pixart", 7), ["samples", 0])


# ---------------------------------------------------------------------- prompts


def conditioning(server: Server, name: str, text: str) -> Tensor:
    """The latents drawn from a prompt, by which two conditions are compared."""
    graph = loaded(name)
    graph["prompt"]["inputs"]["text"] = text
    return server.latents(graph, ["samples", 0])[0]


def weighted(pipe: Any, family: Any, text: str, tokens: slice, weight: float) -> Any:
    """The condition by hand: core's formula on the tokens of the weighted words."""
    cond, empty = family.encode_text(pipe, [text]), family.encode_text(pipe, [""])
    out = cond["text"].clone()
    out[:, tokens] = empty["text"][:, tokens] + weight * (out[:, tokens] - empty["text"][:, tokens])
    return {**cond, "text": out}


# The tiny tokenizers spell: "a red cube" is a, r, e, d, c, u, b, e behind CLIP's start, and T5 marks each word's begin.
_ARGUMENTS = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
WORDS = {"sd15": slice(2, 5), "sdxl": slice(2, 5), "pixart": slice(2, 6), "wan": slice(2, 6), "flux": slice(2, 6)}


@pytest.mark.parametrize("name", WORDS)
def test_prompt_weights_are_cores(server: Server, folder: Folder, name: str) -> None:
    folder(name)
    pipe: Any = tiny.build(name)
    by_hand = weighted(pipe, family_of_pipeline(type(pipe).__name__), "a red cube", WORDS[name], 1.6)
    given = {_ARGUMENTS[key]: value for key, value in by_hand.items()}
    expected = stock(name, output_type="latent", prompt=None, **given)
    actual = conditioning(server, name, "a (red:1.6) cube")
    assert error(actual, expected) <= 1e-5
    plain = conditioning(server, name, "a red cube")
    assert error(actual, plain) > 1e-4
    assert torch.equal(conditioning(server, name, "a (red:1.0) cube"), plain)
    bracketed, heavier = (conditioning(server, name, f"a {red} cube") for red in ("(red)", "(red:1.1)"))
    assert error(bracketed, heavier) <= 1e-6
    assert error(bracketed, plain) > 1e-5


@pytest.mark.parametrize("name", ["zimage", "qwenimage", "sana"])
def test_a_language_model_reads_brackets_as_text_and_the_user_is_told(
    server: Server, folder: Folder, name: str
) -> None:
    folder(name)
    before = server.log.read_text().count("has no prompt weights: it reads '(red:1.3)' as text")
    weights = conditioning(server, name, "a (red:1.3) cube")
    assert server.log.read_text().count("has no prompt weights: it reads '(red:1.3)' as text") == before + 1
    for text, face in (
        ("a (red:1.2) cube", f"The text encoder of {name} has no prompt weights: it reads '(red:1.2)' as text."),
        ("a (red) cube", ""),
        ("a red cube: 3 of 4 (new)", ""),
    ):
        graph = loaded(name)
        graph["prompt"]["inputs"]["text"] = text
        graph["save"] = node("SaveLatent", samples=["samples", 0], filename_prefix="brackets")
        events = [event["data"] for event in server.run(graph).events if event["type"] == "tdm.face"]
        assert [(event["node"], event["text"]) for event in events] == [("prompt", face)]
    assert error(weights, conditioning(server, name, "a red cube")) > 1e-6
    with pytest.raises(PromptError, match="embeddings do not fit the text encoder of"):
        conditioning(server, name, "a embedding:mine cube")


def test_an_embedding_stands_for_its_vectors(server: Server, folder: Folder) -> None:
    """One that holds the encoder's own vectors of a word is that word."""
    folder("sd15")
    (server.models / "embeddings").mkdir(exist_ok=True)
    pipe: Any = tiny.build("sd15")
    ids = pipe.tokenizer("red", add_special_tokens=False)["input_ids"]
    vectors = pipe.text_encoder.get_input_embeddings().weight[ids].detach().clone()
    save_file({"emb_params": vectors}, server.models / "embeddings" / "mine.safetensors")
    save_file({"emb_params": torch.ones(2, 5)}, server.models / "embeddings" / "narrow.safetensors")
    expected = conditioning(server, "sd15", "a red cube")
    assert error(conditioning(server, "sd15", "a embedding:mine cube"), expected) <= 1e-6
    heavy = conditioning(server, "sd15", "a (embedding:mine:1.5) cube")
    assert error(heavy, conditioning(server, "sd15", "a (red:1.5) cube")) <= 1e-6
    assert error(heavy, expected) > 1e-4
    with pytest.raises(PromptError, match="there is no embedding 'other' in models/embeddings"):
        conditioning(server, "sd15", "a embedding:other cube")
    with pytest.raises(PromptError, match="'narrow' is 5 wide, not the 8 of text_encoder"):
        conditioning(server, "sd15", "a embedding:narrow cube")


# ---------------------------------------------------------------------- what does not fit

SIZES = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
WHOLE = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
FREE_U = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
CASES = {
    "CLIPTextEncodeSDXL": ({"clip": ["load", 1], "text_g": "a", "text_l": "a", **SIZES}, "use CLIP Text Encode"),
    "CLIPTextEncodeFlux": ({"clip": ["load", 1], "clip_l": "a", "t5xxl": "a", "guidance": 3.5}, "use CLIP Text Encode"),
    "CLIPTextEncodeSD3": (
        {"clip": ["load", 1], "clip_l": "a", "clip_g": "a", "t5xxl": "a", "empty_padding": "none"},
        "use CLIP Text Encode",
    ),
    "CLIPSave": ({"clip": ["load", 1], "filename_prefix": "x/c"}, "a CLIP of .* cannot be saved"),
    "CheckpointSave": ({**WHOLE, "filename_prefix": "x/k"}, "cannot be saved"),
    "ModelSave": ({"model": ["load", 0], "filename_prefix": "x/m"}, "a MODEL of .* cannot be saved"),
    "VAESave": ({"vae": ["load", 2], "filename_prefix": "x/v"}, "a VAE of .* cannot be saved"),
    "FreeU": ({"model": ["load", 0], **FREE_U}, "reads model_channels of ComfyUI's own networks"),
    "FreeU_V2": ({"model": ["load", 0], **FREE_U}, "reads model_channels of ComfyUI's own networks"),
    "ModelComputeDtype": ({"model": ["load", 0], "dtype": "bf16"}, "ModelComputeDtype does not fit"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_node_that_does_not_fit_says_so_in_one_line(server: Server, folder: Folder, kind: str) -> None:
    folder("pixart")
    inputs, message = CASES[kind]
    graph = {**loaded("pixart"), "own": node(kind, **inputs)}
    if kind.startswith("CLIPText"):
        graph["guider"]["inputs"]["conditioning"] = ["own", 0]
    elif kind in ("FreeU", "FreeU_V2", "ModelComputeDtype"):
        graph["sigmas"]["inputs"]["model"] = ["own", 0]
    with pytest.raises(PromptError, match=message) as failure:
        server.latents(graph, ["samples", 0])
    assert "\n" not in str(failure.value).strip()


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("ModelComputeDtype", {"dtype": "default"}), ("RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 1.0})],
)
def test_a_node_that_fits_works(server: Server, folder: Folder, kind: str, inputs: dict[str, Any]) -> None:
    folder("pixart")
    graph = {**loaded("pixart"), "own": node(kind, model=["load", 0], **inputs)}
    graph["sigmas"]["inputs"]["model"] = ["own", 0]
    assert server.latents(graph, ["samples", 0])[0].isfinite().all()
