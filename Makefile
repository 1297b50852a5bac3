# Everything is set up in .venv from Python 3.11 and the package registries; nothing is installed by hand.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TRANSFORMERS_VERBOSITY ?= error
export DIFFUSERS_VERBOSITY ?= error

.PHONY: demo test test-slow lint types eval bench gpu proof-cpu teacher clean

demo: .venv/demo
	$(BIN)/tdm generate --compare --force --out outputs/demo.png \
	  "two red stars above a blue ball at night" "a green heart on the beach" \
	  "three yellow rings left of a purple square in the snow" "an orange moon over the waves" \
	  "two pink triangles right of a blue cross in a meadow" "one red heart under two green boxes at sea"

test: .venv/test .venv/comfyui lint types
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/test .venv/comfyui
	$(BIN)/python -m pytest -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/tdm
	MYPYPATH=.venv/types $(BIN)/mypy -p tdm -m tdm.tests.user_script

eval: .venv/demo
	$(BIN)/tdm eval --force

bench: .venv/demo
	$(BIN)/tdm bench

# SD1.5 and SDXL at full size with random weights, distilled and measured: 9 GB of memory and of disk, ten minutes or more.
proof-cpu: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tdm.tests.training.full_size sd15 sdxl --out runs/full-size

# On a machine with a GPU; BASES="DIR DIR" are folders of real bases. Stopped at any moment, it goes on with what is missing.
gpu: .venv/gpu
	$(BIN)/python -c 'import torch; assert torch.version.cuda, "torch in .venv is built without CUDA; install a build with it there"'
	$(BIN)/tdm prove --device cuda $(if $(BASES),--bases $(BASES))

# Hours on CPUs. Stopped at any moment, it begins the part it was in again, the denoiser at its last checkpoint.
teacher: .venv/demo runs/teacher/vae-decoder.json
	$(BIN)/python -m tdm.training.worlds.teacher.denoiser --out runs/teacher
	$(BIN)/python -m tdm.training.worlds.teacher.bundle --run runs/teacher --out runs/bundled

runs/teacher/vae.json: | .venv/demo
	$(BIN)/python -m tdm.training.worlds.teacher.vae --out runs/teacher

runs/teacher/vae-decoder.json: runs/teacher/vae.json
	$(BIN)/python -m tdm.training.worlds.teacher.vae --out runs/teacher --decoder-only

# torch first and pinned: a plain "torch" would bring the CUDA build and gigabytes with it on a machine without a GPU.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.venv/gpu: .venv/demo
	$(BIN)/pip install -q -c constraints.txt -e ".[quant]"
	touch $@

# A real ComfyUI server in the user's cache, 2.1 GB: see tests/comfyui/install.py. Where it cannot be installed, its tests say
# so: they are left out, or fail in CI.
.venv/comfyui: .venv/test tests/comfyui/install.py
	-$(BIN)/python tests/comfyui/install.py && touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
