"""Does a student draw the end of its teacher's ODE from the same noise, or only from the same distribution?"""

from __future__ import annotations

import torch
from torch import Tensor


def agreement(samples: Tensor, same: Tensor, others: Tensor) -> Tensor:
    """For each sample (its distance to the teacher's from the same noise, the teacher's own distance between noises).

    The mean of the first over the mean of the second is 0 for the teacher's ODE itself, and about 1 for a sampler that
    draws from the teacher's distribution independently of the noise that it started from.

    Args:
        samples: ``[n, ...]``, a student's samples: pictures or points.
        same: ``[n, ...]``, the teacher's from the same conditions and noise.
        others: ``[n, k, ...]``, the teacher's from the same conditions and k other noises.

    Returns:
        float64 ``[n, 2]``, Euclidean distances.
    """
    samples, same, others = samples.double().flatten(1), same.double().flatten(1), others.double().flatten(2)
    spread = (others - same[:, None]).norm(dim=2).mean(1)
    return torch.stack([(samples - same).norm(dim=1), spread], 1)
