"""A value that was computed from tensors of modules, and whether it is still true."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_ext._compat import tensor_places


class Kept(NamedTuple):
    """A value with the tensors that it depends on, as they were: which tensor each module held, and how often it had been written to.

    What PyTorch does not count, such as writing to `.data`, is not seen.
    """

    sources: tuple[tuple[dict[str, Any], str, Tensor, int], ...]
    value: Any

    def still_true(self) -> bool:
        for place, name, tensor, version in self.sources:
            if place.get(name) is not tensor or tensor._version != version:
                return False
        return True


def keep(modules: Iterable[nn.Module], compute: Callable[[], Any]) -> Kept | None:
    """`compute()` without gradients and autocast, as a value that depends on the own tensors of `modules`.

    None if there are no such tensors, or changes of one are not counted.
    """
    places = [
        (place, name, tensor)
        for module in modules
        for place in tensor_places(module)
        for name, tensor in place.items()
        if tensor is not None
    ]
    if not places or any(tensor.is_inference() for _, _, tensor in places):
        return None
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(places[0][2].device.type, enabled=False):
        return Kept(tuple((place, name, tensor, tensor._version) for place, name, tensor in places), compute())
