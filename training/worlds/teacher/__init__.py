"""Trains the bundled teacher from scratch: the VAE (:mod:`.vae`), then text encoder and denoiser (:mod:`.denoiser`).

python -m tdm.training.worlds.teacher.vae      --out runs/teacher
python -m tdm.training.worlds.teacher.denoiser --out runs/teacher
"""
