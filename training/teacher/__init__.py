"""Trains the bundled teacher from scratch: the VAE (:mod:`.vae`), then text encoder and denoiser (:mod:`.denoiser`).

python -m tdm.training.teacher.vae      --out runs/teacher
python -m tdm.training.teacher.denoiser --out runs/teacher
"""
