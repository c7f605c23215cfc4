"""A prompt as a part of the position embeddings, where that is exact: the model is then an ordinary one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_ext.tuners.lorvp.layer import LorVpConvolution

_NAMES = ("position_embedding", "pos_embed")  # what tables of positions are called
_TOLERANCE = 1e-4


def position_table(model: nn.Module, name: str, layer: LorVpConvolution, merged_map: Tensor) -> Tensor:
    """Where a map `(1, D, h, w)` of the merged layer called `name` can be added: `(h w, D)`, a view of the model's positions.

    Whether nothing stands between patches and positions is tried, with noise, on a copy of the module that has both.

    Raises:
        ValueError: there is no such table, or something stands between.
    """
    depth, height, width = merged_map.shape[1:]
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if tables := _tables(module, height * width, depth):
            inside = ".".join(parts[end:])
            for table_name in tables:
                if _is_exact(module, inside, table_name, layer, merged_map):
                    return _rows(module, table_name, height * width)
            raise ValueError(
                f"something stands between the patches of {type(module).__name__} and its positions, so that a prompt cannot be folded into them."
            )
    raise ValueError(
        f"{type(model).__name__} has no table of positions for its patches into which a prompt could be folded."
    )


def _tables(module: nn.Module, patches: int, depth: int) -> list[str]:
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    own |= {
        f"{name}.weight": child.weight for name, child in module.named_children() if isinstance(child, nn.Embedding)
    }
    return [
        name
        for name, table in own.items()
        if name.startswith(_NAMES) and table.shape[-1] == depth and table.shape[-2] >= patches
    ]


def _rows(module: nn.Module, table_name: str, patches: int) -> Tensor:
    """Of the patches: tokens that stand for no patch come first."""
    table = module.get_parameter(table_name).data
    return table.view(-1, table.shape[-1])[-patches:]


@torch.no_grad()
def _is_exact(module: nn.Module, conv_name: str, table_name: str, layer: LorVpConvolution, merged_map: Tensor) -> bool:
    twin = copy.deepcopy(module).float().eval()
    base = layer.convolution
    device = base.weight.device
    settings = layer.settings[layer.merged_adapters[0]]
    pixels = torch.randn(2, base.in_channels, *settings.size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, enabled=False):
        try:
            expected = _first(twin(pixels))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"whether a prompt can be folded into the positions of {type(module).__name__} cannot be tried, since it does not take pictures alone, or not of this size ({error})."
            ) from error
        parent, _, child = conv_name.rpartition(".")
        setattr(twin.get_submodule(parent), child, twin.get_submodule(conv_name).get_base_layer())  # type: ignore[operator]
        _rows(twin, table_name, merged_map.shape[2] * merged_map.shape[3]).add_(as_rows(merged_map).float())
        found = _first(twin(pixels))
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max()))


def as_rows(constant_map: Tensor) -> Tensor:
    """`(1, D, h, w)` as `(h w, D)`, patches row by row."""
    return constant_map[0].flatten(1).mT


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
