"""Distil a few-step student of your own base from Python, with nothing but a list of prompts.

    python examples/distil_in_python.py path/to/base prompts.txt --preset sdxl 24gb --set student.lr=1e-4

The base is a diffusers pipeline in a folder, or its hub id. The prompts are a text file with one prompt a line. The
preset of the base's family (`tdm distill --list`) has rates and grid.
"""

import argparse
from pathlib import Path

import torch
from tdm import TDMPipeline
from tdm.pipelines.students.file import save_student
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/mine"), help="folder of the run")
    parser.add_argument("--preset", nargs="*", default=[], help="presets or YAML files, such as: sdxl 24gb")
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="see tdm distill --settings")
    args = parser.parse_args()

    task_settings = ["task.name=pipeline", f"task.model={args.base}", f"task.prompts={args.prompts}"]
    config = load_config(args.preset, [*task_settings, f"updates={args.updates}", *args.set])
    task = build_task(config.task, config.memory, "cuda" if torch.cuda.is_available() else "cpu")

    def report(run: Run, metrics: dict[str, float]) -> None:
        """Called with each line of metrics.jsonl; `run.as_student()` is the student of that moment."""
        if "student_loss" in metrics:
            print(f"update {run.step}: student loss {metrics['student_loss']:.4f}")

    run = distill(task, config, args.out, callbacks=[report])
    student = run.as_student()
    print("student:", save_student(args.out / "student.safetensors", student))

    pipe = TDMPipeline.from_pretrained(args.base, student=student)
    prompt = args.prompts.read_text(encoding="utf-8").splitlines()[0]
    picture = pipe(prompt, height=student.recipe.height, width=student.recipe.width).images[0]
    picture.save(args.out / "picture.png")
    print("picture:", args.out / "picture.png")


if __name__ == "__main__":
    main()
