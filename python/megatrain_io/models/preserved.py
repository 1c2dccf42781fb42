"""What runs before the first step leaves no trace: modules and random generators as they were."""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["preserved"]

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


@contextmanager
def preserved(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules their buffers, attributes and mode back at the end, and the generators of the CPU their states.

    Some rotary tables are made anew for a longer row, and stay so: what is tried before training would be seen in it.
    Parameters are bound for a call only, and are not looked at.

    Args:
        roots: the modules, with all that is in them.
    """
    modules = [module for root in roots for module in root.modules()]
    buffers = [{name: each.clone() for name, each in _buffers(module).items()} for module in modules]
    kept = [dict(_buffers(module)) for module in modules]
    attributes = [_attributes(module) for module in modules]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - others draw from it
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        for module, values, own, others in zip(modules, buffers, kept, attributes, strict=True):
            _restore_buffers(module, own, values)
            for name in _attributes(module).keys() - others.keys():
                del vars(module)[name]
            vars(module).update(others)


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers(recurse=False))


def _attributes(module: nn.Module) -> dict[str, object]:
    """What a module keeps besides parameters, buffers and modules; containers are copied, what is in them is not."""
    return {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value
        for name, value in vars(module).items()
        if name not in _OF_TORCH
    }


def _restore_buffers(
    module: nn.Module, own: dict[str, torch.Tensor], values: dict[str, torch.Tensor]
) -> None:
    for name in _buffers(module).keys() - own.keys():
        delattr(module, name)
    for name, buffer in own.items():
        if not torch.equal(buffer, values[name]):
            buffer.copy_(values[name])
        setattr(module, name, buffer)
