"""Clipping by the norm over all gradients, and whether it pays to update before that norm is known."""

import numpy as np

__all__ = ["Speculation", "clip_coefficient"]

# Added to the norm, as torch.nn.utils.clip_grad_norm_ does.
_EPS = 1e-6
# What a step has to say of the next one: about one in ten.
_MEMORY = 0.9
# Share of clipped steps below which speculation is worth it. It is faster up to half or a little more
# (benches/step/clipping.py), but each wrong one writes all of the state once more.
_WORTH = 0.5


def clip_coefficient(norm: float, max_grad_norm: float) -> float:
    """What gradients are multiplied by, exact as fp32: at most 1 (torch.nn.utils.clip_grad_norm_)."""
    return float(np.float32(min(1.0, max_grad_norm / (norm + _EPS))))


class Speculation:
    """Whether the next step will stay below the limit.

    Attributes:
        clipped: share of the last steps that did not, the newest counting most.
    """

    def __init__(self) -> None:
        self.clipped = 0.0

    @property
    def is_worth_it(self) -> bool:
        """Whether updating at once is likely to be faster than waiting for the norm."""
        return self.clipped < _WORTH

    def learn(self, *, is_clipped: bool) -> None:
        """Take note of a step."""
        self.clipped = _MEMORY * self.clipped + (1 - _MEMORY) * is_clipped
