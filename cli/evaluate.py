"""tdm eval: measure a teacher and its students on held-out prompts of the bundled world, or on your prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import TDMError
from .common import check_strength, load_pipeline
from .output import check_folder

HELP = """\
Measure the guided teacher, the teacher at 4 steps and the student, on prompts that name combinations no
training picture showed. Prints a table and writes eval.json and eval.md (everything, with 95 % intervals by bootstrap
over prompts), eval.png (plots) and grid.png (pictures).

  accuracy    share of pictures in which everything the prompt says is right, read back from the pixels; in the files
              also by attribute and by held-out combination
  distance    to the teacher's pictures of the same prompt: energy distance on random features; the teacher's own row
              is the floor
  diversity   of pictures of one prompt over seeds, over the teacher's
  bright, contrast, saturation    over the teacher's: 1 is equal
  sharpness   power at wavelengths of 2 to 16 pixels over the teacher's: below 1 is blurred, above 1 is over-sharpened

Only in the files: power by wavelength over the teacher's, distance to the teacher's picture from the same noise (ode),
sliced Wasserstein and Frechet distance on random features with a fixed seed (not FID), and extra scores.

The verifier reads the world of the bundled model. For any other base, --prompts-file measures everything but accuracy:

  tdm eval --model my/base --student mine.safetensors --prompts-file prompts.txt --teacher-guidance 7
  tdm eval --student runs/seed0/student.safetensors runs/seed1/student.safetensors    and their mean and range
  tdm eval --model my/fine-tune --student mine.safetensors --strength 0.5 0.75 1 --prompts-file prompts.txt
  tdm eval --steps 4 --base-first                 what more variety costs
  tdm eval --extra clip=openai/clip-vit-large-patch14 --extra fid=real_pictures    needs those weights

The teacher's pictures are kept in ~/.cache/tdm/pictures; a † marks seconds that were measured when they were drawn.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="base model: folder or hub id (default: the bundled one, or the first student's)")
    add("--student", nargs="+", metavar="STUDENT", help="files, folders or hub ids (default: the bundled one)")
    add("--steps", default="1,2,4,8", help="the students' step counts (default 1,2,4,8)")
    add("--solver-order", type=int, choices=(1, 2), help="of the students' sampler (default: the students' own)")
    add(
        "--strength",
        type=float,
        nargs="+",
        default=[],
        help="of the students on the base, a row for each (default 1); less may suit a fine-tuned base",
    )
    add("--base-first", action="store_true", help="a row more for each of the students': the first step by the base")
    add("--prompts", type=int, help="how many (default 256 held-out prompts, or the whole file)")
    add("--prompts-file", type=Path, metavar="FILE", help="your prompts, one a line; without accuracy")
    add("--seed", type=int, default=20_000, help="of held-out prompts and noises (default 20000)")
    add("--teacher-steps", type=int, help="of the guided teacher (default: the base's own, 50 for the bundled one)")
    add(
        "--teacher-guidance",
        type=float,
        help="guidance scale of the guided teacher (default: the base's own, 3 for the bundled one)",
    )
    add(
        "--extra",
        action="append",
        default=[],
        metavar="NAME[=ARGUMENT]",
        help="clip=MODEL, hpsv2[=FILE], image_reward[=FILE] or fid=FOLDER_OF_REAL_PICTURES, if you have the weights",
    )
    add("--out", type=Path, default=Path("outputs/eval"), help="folder (default outputs/eval)")
    add("--force", action="store_true", help="replace results that exist")


def run(args: argparse.Namespace) -> None:
    try:
        steps = [int(text) for text in args.steps.split(",")]
    except ValueError:
        raise TDMError(f"--steps {args.steps!r} is not a list of whole numbers such as 1,2,4,8") from None
    if min(steps) < 1 or (args.teacher_steps is not None and args.teacher_steps < 1):
        raise TDMError("--steps and --teacher-steps must be at least 1")
    for strength in args.strength:
        check_strength(strength)
    if len({f"{strength:g}" for strength in args.strength}) < len(args.strength):  # rows are named so
        raise TDMError("a --strength is given twice")
    if args.prompts is not None and args.prompts < 8:
        raise TDMError("--prompts must be at least 8")
    if not 0 <= args.seed < 2**62:
        raise TDMError(f"--seed must be 0 or more and below 2^62, not {args.seed}")
    if (args.out / "eval.json").exists() and not args.force:
        raise TDMError(f"{args.out} already holds an evaluation; choose another --out, or replace it with --force")
    check_folder(args.out)
    from ..files import user_cache
    from ..training.eval_report import INTERVALS, over_students, table, write
    from ..training.evaluate import Plan, Prompts, evaluate, held_out_prompts
    from ..training.metrics.extras import extra
    from ..training.tasks.prompts import training_prompts

    if args.prompts_file is not None:
        prompts = Prompts(training_prompts(str(args.prompts_file), 0)[: args.prompts])
    else:
        prompts = Prompts(*held_out_prompts(args.prompts or 256, args.seed))
    extras = [extra(text) for text in args.extra]
    recipe = {} if args.solver_order is None else {"solver_order": args.solver_order}

    def put_in(pipe: Any, student: str) -> None:
        pipe.load_student(student, recipe=recipe)

    students = args.student or []
    pipe = load_pipeline(args.model, students[0] if students else None, recipe)
    plan = Plan(steps, args.teacher_steps, args.teacher_guidance, args.strength, args.base_first)
    args.teacher_steps, args.teacher_guidance = plan.teacher(pipe.teacher_call)  # for the record of the settings
    rows, sheet = evaluate(
        pipe,
        prompts,
        plan,
        students=students if len(students) > 1 else (),
        seed=args.seed,
        cache=user_cache() / "pictures",
        extras=extras,
        load=put_in,
    )
    rows = [*rows, *over_students(rows)]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write(rows, sheet, args.out, {key: value for key, value in settings.items() if key not in ("run", "command")})
    print(table(rows))
    print(INTERVALS)
    print(f"wrote {args.out}/eval.json, eval.md, eval.png and grid.png")
