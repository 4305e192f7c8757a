"""Weights handed over one by one as a model gets them, so that it is never whole in one place.

The hand-over hangs on the registration of parameters, which is torch's own and the one thing that
every way of making or loading a module does; no name or format of an architecture matters to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

#: Takes a parameter that is whole in host memory and leaves in it what this process keeps.
Place = Callable[[nn.Parameter], None]

_NO_READING_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def placed(
    place: Place | None, is_due: Callable[[nn.Parameter], bool] = lambda parameter: True
) -> Iterator[None]:
    """Give every parameter that a module gets inside the block to `place`.

    Args:
        place: None changes nothing.
        is_due: which parameters; never those on the meta device, which have no values yet.
    """
    if place is None:
        yield
        return

    def take(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and is_due(parameter):
            place(parameter)

    hook = register_module_parameter_registration_hook(take)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def placed_as_loaded(place: Place | None) -> Iterator[None]:
    """Give every weight that `from_pretrained` reads inside the block to `place`.

    Weights that a checkpoint lacks are not given: transformers has yet to draw them.

    Args:
        place: None changes nothing.
    """
    if place is None:
        yield
        return
    before = os.environ.get(_NO_READING_AHEAD)
    # Else threads read ahead of what is placed, and hold it.
    os.environ[_NO_READING_AHEAD] = "1"
    try:
        with placed(place, lambda parameter: getattr(parameter, "_is_hf_initialized", False)):
            yield
    finally:
        if before is None:
            del os.environ[_NO_READING_AHEAD]
        else:
            os.environ[_NO_READING_AHEAD] = before
