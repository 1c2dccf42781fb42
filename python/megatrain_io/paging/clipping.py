"""Clipping by the norm over all gradients, and whether it pays to update before that norm is known."""

import numpy as np

__all__ = ["Guess", "clip_coefficient"]

# Added to the norm, as torch.nn.utils.clip_grad_norm_ does.
_EPS = 1e-6
# Share that the average keeps at each step: the last ten steps count most.
_MEMORY = 0.9
# Share of clipped steps below which updating at once is worth it. It is faster up to half or a little more
# (benches/step/clipping.py), but each update that is taken back writes all of the state once more.
_WORTH = 0.5


def clip_coefficient(norm: float, max_grad_norm: float) -> float:
    """What gradients are multiplied by, exact as fp32 and at most 1.

    The formula is that of ``torch.nn.utils.clip_grad_norm_``: ``min(1, max_grad_norm / (norm + 1e-6))``.
    """
    return float(np.float32(min(1.0, max_grad_norm / (norm + _EPS))))


class Guess:
    """Guesses whether the norm of the next step's gradients will stay below the limit.

    Attributes:
        clipped: moving average of the share of steps that were clipped, 0 to 1.
    """

    def __init__(self) -> None:
        self.clipped = 0.0

    @property
    def is_worth_it(self) -> bool:
        """Whether updating at once is likely to be faster than waiting for the norm."""
        return self.clipped < _WORTH

    def learn(self, *, is_clipped: bool) -> None:
        """Take a step into the average."""
        self.clipped = _MEMORY * self.clipped + (1 - _MEMORY) * is_clipped
