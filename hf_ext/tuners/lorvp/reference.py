"""LoR-VP in formulas: prompts of a few numbers, what a convolution makes of them, and which source class stands for a target class.

Shapes: N images, C colours, H x W pixels, R rank, S source classes, T target classes. Everything in the dtype of its arguments.
Source: https://huggingface.co/papers/2502.00896.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# -- prompts ---------------------------------------------------------------------------------------------------------------


def low_rank(left_CHR: Tensor, right_CRW: Tensor) -> Tensor:
    """The paper's prompt `(C, H, W)`: a product B_c A_c for every colour c."""
    return torch.bmm(left_CHR, right_CRW)


def low_rank_shared(colours_CR: Tensor, left_HR: Tensor, right_RW: Tensor) -> Tensor:
    """A prompt `(C, H, W)` whose colours share their factors: P_c = sum_k s_ck b_k a_k^T, a tensor of CP rank R."""
    return (colours_CR[:, None, :] * left_HR) @ right_RW


def frame_mask(height: int, width: int, border: int, device: torch.device | None = None) -> Tensor:
    """`(H, W)`, bool: pixels that are less than `border` away from an edge."""
    mask_HW = torch.ones(height, width, dtype=torch.bool, device=device)
    mask_HW[border : height - border, border : width - border] = False
    return mask_HW


def frame(values_CN: Tensor, mask_HW: Tensor) -> Tensor:
    """A prompt `(C, H, W)` that is free where the mask is true, row by row, and zero elsewhere."""
    return values_CN.new_zeros(len(values_CN), *mask_HW.shape).masked_scatter(mask_HW, values_CN)


def tiled(tile_CPP: Tensor, height: int, width: int) -> Tensor:
    """A prompt `(C, H, W)` that repeats one square."""
    size = tile_CPP.shape[-1]
    return tile_CPP.repeat(1, -(-height // size), -(-width // size))[:, :height, :width]


def resized(prompt_CHW: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, corners not aligned, no antialiasing.

    Linear in rows and in columns, so that a product of factors stays one: its left factor's columns and right factor's rows are resized.
    """
    return F.interpolate(prompt_CHW[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def scaled(prompt_CHW: Tensor, scale: Sequence[float]) -> Tensor:
    """What a prompt for pixels in [0, 1] adds to pixels that were normalised by std: scale is 1 / std, for each colour."""
    if len(set(scale)) == 1:
        return prompt_CHW * scale[0]
    return torch.stack([prompt_HW * factor for prompt_HW, factor in zip(prompt_CHW, scale, strict=True)])


# -- label mapping ---------------------------------------------------------------------------------------------------------


def frequencies(predicted_N: Tensor, labels_N: Tensor, source: int, target: int) -> Tensor:
    """`(S, T)`, int64: how often source class s is predicted for images of target class t."""
    return torch.bincount(predicted_N * target + labels_N, minlength=source * target).view(source, target)


def greedy_mapping(counts_ST: Tensor) -> Tensor:
    """`(T,)`, int64: again and again the largest count is taken, the first of several; its source and its target class are then gone."""
    counts_ST = counts_ST.clone()
    mapping_T = counts_ST.new_zeros(counts_ST.shape[1], dtype=torch.long)
    for _ in range(counts_ST.shape[1]):
        source, target = divmod(int(counts_ST.argmax()), counts_ST.shape[1])
        mapping_T[target] = source
        counts_ST[source], counts_ST[:, target] = -1, -1
    return mapping_T


def agreement(counts_ST: Tensor, mapping_T: Tensor) -> float:
    """Share of images that a mapping gives the right target class, if the most probable source class is what counts."""
    return float(counts_ST.gather(0, mapping_T[None]).sum() / counts_ST.sum())
