"""What a developer writes first; read by type checkers only (test_types.py)."""

from pathlib import Path

import tdm
import torch
from tdm import TDMPipeline, TDMScheduler

pipe = TDMPipeline.from_pretrained()
pipe = TDMPipeline.from_pretrained("base", student=Path("student.safetensors"), dtype=torch.bfloat16).to("cuda")
generator = torch.Generator().manual_seed(0)
image = pipe("three yellow rings at sea", generator=generator).images[0]
image.save("out.png")
with pipe.teacher() as teacher:
    reference = teacher("three yellow rings at sea", num_inference_steps=50, guidance_scale=3.0).images[0]
with pipe.base_first():
    pipe(prompt="a", generator=generator)
for step in pipe.stream("a red star"):
    print(step.index, step.total, step.preview[0] if step.output is None else step.output.images[0])
redrawn = pipe.image_to_image("a", image, strength=0.75).images[0]
pipe.load_student("other.safetensors", recipe={"solver_order": 2})
pipe.load_lora_weights("style.safetensors", adapter_name="style")
pipe.set_adapters(["student", "style"], [1.0, 0.8])
pipe.enable_model_cpu_offload()
pipe.transformer.compile()
pipe.save_pretrained("saved")
pipe.save_merged("merged", force=True)
print(pipe.recipe.default_steps, pipe.scheduler.config.solver_order, pipe.use_attention())
pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps=[999, 856, 665, 399])
scheduler = TDMScheduler(prediction_type="flow_prediction", trained_timesteps=[1000, 900, 750, 500])
scheduler.set_timesteps(4)
x = torch.randn(1, 4, 8, 8)
for t in scheduler.timesteps:
    x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
print(tdm.__version__)
