"""What a student can minimise, over the same trajectory, roles and re-noising: a page of pure functions each.

``matching`` is TDM and, by its switches, DMD2 without GAN, Phased and Decoupled DMD and SiD; ``consistency`` is LCM
without data, ``regression`` learns the end of the teacher's ODE. A switch is a setting (training/config.py); presets
beside the families' put the published combinations together.
"""
