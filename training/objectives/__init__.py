"""What a student can minimise, over the same trajectory, roles and re-noising: a page of pure functions each.

``matching`` is TDM and, by its switches, DMD2 without GAN, Phased and Decoupled DMD and SiD; ``consistency`` is LCM
without data, ``regression`` learns the end of the teacher's ODE. A switch is a setting (training/config.py); presets
beside the families' put the published combinations together.
"""

from ..config import DistillConfig


def method_of(config: DistillConfig) -> str:
    """What a run's settings are called, with its source."""
    t, o = config.trajectory, config.objective
    if o.name == "consistency":
        return "latent consistency distillation without pictures (LCM, arXiv 2310.04378)"
    if o.name == "regression":
        return "regression onto the end of the teacher's ODE"
    if o.gradient == "sid":
        return "score identity distillation (SiD, arXiv 2404.04057)"
    if t.renoise == "clean" and t.bands == "full":
        return "distribution matching without a GAN (DMD2, arXiv 2405.14867)"
    return "Trajectory Distribution Matching (arXiv 2503.06674)"
