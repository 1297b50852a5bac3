"""Turn a finished teacher into the bundled one: float16 weights, and a record of how it was made.

python -m tdm.training.worlds.teacher.bundle --run runs/teacher --out bundled
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline

from ....files import whole_folder


def bundle(run: Path, out: Path) -> Path:
    """Write ``out/teacher`` from ``run/pipeline``; the folder appears whole or not at all."""
    target = out / "teacher"
    pipe: Any = PixArtAlphaPipeline.from_pretrained(run / "pipeline", dtype=torch.float16)
    # transformers loads weights in the dtype they are stored in, diffusers in float32: stored in float16, the text
    # encoder would not fit the rest of a pipeline that is loaded without a dtype.
    pipe.text_encoder.float()
    with whole_folder(target, force=True) as unfinished:
        pipe.save_pretrained(unfinished)
        for path in unfinished.rglob("*.json"):  # diffusers notes the folder a part was loaded from
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*.json"))}
        (unfinished / "training.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    target = bundle(args.run, args.out)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
