"""Training: distil a few-step student from a base, with prompts alone.

A run is made from a configuration (`config.py`, read by `settings.py`), a task (`tasks/`: what is distilled) and
`distill` (`loop.py`). This is a whole run in Python, on the bundled base:

>>> from pathlib import Path
>>> from tdm import TDMPipeline
>>> from tdm.training.loop import distill
>>> from tdm.training.progress import silent
>>> from tdm.training.settings import load_config
>>> from tdm.training.tasks import build_task
>>> _ = Path("prompts.txt").write_text("a red star above two blue moons at night\\na green heart on the beach")
>>> short = ["updates=2", "batch_size=4", "student.rank=4", "critic.rank=4", "output.preview_every=0"]
>>> config = load_config("bundled", ["task.prompts=prompts.txt", "task.cache=cache", *short])
>>> task = build_task(config.task, config.memory, "cpu", silent)
>>> run = distill(task, config, "run", report=silent)
>>> pipe = TDMPipeline.from_pretrained(run.as_student())
>>> pipe.set_progress_bar_config(disable=True)
>>> pipe("a red star above two blue moons at night").images[0].size
(64, 64)

`Run.as_student` is the student as it is at that moment, in memory. A callback gets the run with each line of metrics,
so that a student can be drawn or evaluated while it is trained:

>>> def draw(run, metrics):
...     pipe.load_student(run.as_student())
...     pipe("a green heart on the beach").images[0].save(f"{run.step}.png")
>>> run = distill(task, config, "another", report=silent, callbacks=[draw])
>>> Path("2.png").is_file()
True

The folder of the run has its record and its checkpoint; `export.py` writes the student from it as a file or a pipeline.
"""
