"""Spherical linear interpolation between noises: the paper's section 5.3 and appendix D.5."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this the two are one direction, up to rounding, and the straight line between them is the arc.
SMALLEST_SINE = 1e-6


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From ``a`` (weight 0) to ``b`` (weight 1) along the arc between them, exactly these at its ends.

    sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, theta being the angle between a and b. Noise of d
    dimensions lies close to a sphere of radius sqrt(d), and so does what is made here; the middle of a straight line
    would have a norm of about sqrt(d / 2), which no network was trained on.

    Args:
        a, b: tensors of one shape and dtype; the arithmetic is in float64.
        weight: from 0 to 1.

    Returns:
        a tensor of their shape and dtype.

    Raises:
        ValueError: for tensors that point in opposite directions, between which there is no one arc.
    """
    if weight in (0, 1):
        return a.clone() if weight == 0 else b.clone()
    x, y = a.double(), b.double()
    cosine = (x * y).sum() / (x.norm() * y.norm())
    theta = math.acos(max(-1.0, min(1.0, float(cosine))))
    sine = math.sin(theta)
    if sine < SMALLEST_SINE:
        if theta > 1:
            raise ValueError("these two point in opposite directions: there is no one arc between them")
        return torch.lerp(x, y, weight).to(a.dtype)
    found = math.sin((1 - weight) * theta) / sine * x + math.sin(weight * theta) / sine * y
    return found.to(a.dtype)
