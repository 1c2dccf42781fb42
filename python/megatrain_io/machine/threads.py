"""How torch's threads wait for one another on cores that they share with the workers of the pipeline."""

from collections.abc import MutableMapping

__all__ = ["let_waiting_threads_yield"]

# What libgomp itself takes where it knows of more threads than cores; it does not know of the workers.
_SPINS = "1000"

# Whoever set one of them has decided how torch's threads wait.
_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def let_waiting_threads_yield(environment: MutableMapping[str, str]) -> None:
    """Have torch's threads sleep soon when they wait, and not spin for a millisecond on a core that workers need.

    Works for libgomp, which torch computes with on Linux, and only before torch is imported. No bit depends on it.

    Args:
        environment: of this process; ``GOMP_SPINCOUNT`` is set there, unless that or ``OMP_WAIT_POLICY`` is.
    """
    if not any(name in environment for name in _OWN):
        environment["GOMP_SPINCOUNT"] = _SPINS
