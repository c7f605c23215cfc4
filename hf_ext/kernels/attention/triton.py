"""Attention over packed tokens on a GPU: the tokens of a head are split among programs, each keeps a running softmax, and the parts are merged.

This is Flash-Decoding (https://pytorch.org/blog/flash-decoding) on the packed planes of SQuat (https://huggingface.co/papers/2503.24358) and
KIVI (https://huggingface.co/papers/2402.02750). A code becomes a half-precision number without a conversion: its bits are put into the mantissa
of a power of two, which is subtracted again. Scales are applied to the codes in registers, two at a time. To fold them into the queries and the
weights instead would cost more, since the few rows of a head are padded to 16. The minimum of the keys becomes a bias of the scores.

Shapes: B batch, H key-value heads, R query rows of a key-value head (its query heads times the new tokens), M = R padded, T tokens of a tile,
C = D channels, padded to a power of two and in the order in which the planes of the keys or of the values hold them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from hf_ext.kernels.attention.reference import Tokens
from hf_ext.kernels.quantize.triton import precision

TILE = 64  # tokens between two updates of the running softmax
PER_PROCESSOR = 3  # programs that share a multiprocessor
MOST_ROWS = 64


@triton.jit
def _channels(D: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Channels in the order of the planes of BITS bits, every plane padded alike, and which of them are real."""
    place_C = tl.arange(0, C)
    if D == C:
        return place_C, tl.full((C,), 1, tl.int1)
    W: tl.constexpr = C * BITS // 8
    return place_C // W * (D * BITS // 8) + place_C % W, place_C % W < D * BITS // 8


@triton.jit
def _planes(rows_T, D: tl.constexpr, C: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, LIFT: tl.constexpr):
    """Codes of BITS bits times 2^LIFT, float16 `(C, T)`; rows_T point to the tokens' first bytes."""
    W: tl.constexpr = C * BITS // 8
    byte_W = tl.arange(0, W)[:, None]
    if D == C:
        bytes_WT = tl.load(rows_T[None, :] + byte_W)
    else:
        bytes_WT = tl.load(rows_T[None, :] + byte_W, mask=byte_W < D * BITS // 8, other=0)
    # The code stays at its place in the byte: that bit of the mantissa weighs 2^LIFT under the power of two 2^(10 + LIFT - place).
    place = tl.arange(0, 8 // BITS)[:, None, None] * BITS
    power = (25 + LIFT - place << 10).to(tl.int16)
    number = bytes_WT.to(tl.int16)[None, :, :] & ((1 << BITS) - 1 << place).to(tl.int16) | power
    return tl.reshape(number.to(tl.float16, bitcast=True) - power.to(tl.float16, bitcast=True), (C, T))


@triton.jit
def _codes(rows_T, D: tl.constexpr, C: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr):
    """Codes, float16 `(C, T)`."""
    if BITS == 3:
        return _planes(rows_T, D, C, T, 2, 0) + _planes(rows_T + D // 4, D, C, T, 1, 2)
    else:
        return _planes(rows_T, D, C, T, BITS, 0)


@triton.jit
def _key_groups(numbers, start, end, channel_C, real_C, D: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Scale or minimum of the groups of a tile of keys, `(C, GROUPS)`; past the end the last group again."""
    group_G = tl.minimum(start // GROUP + tl.arange(0, GROUPS), (end - 1) // GROUP)
    return tl.load(numbers + group_G[None, :] * D + channel_C[:, None], mask=real_C[:, None], other=0)


@triton.jit
def _value_groups(numbers, token_T, channel_C, D: tl.constexpr, C: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr):
    """Scale or minimum of the values, `(C, T)`."""
    GROUPS: tl.constexpr = D // GROUP
    if D == C:
        at_GT = token_T[None, :] * GROUPS + tl.arange(0, GROUPS)[:, None]
        return tl.reshape(tl.broadcast_to(tl.load(numbers + at_GT)[:, None, :], (GROUPS, GROUP, T)), (C, T))
    else:
        return tl.load(numbers + token_T[None, :] * GROUPS + tl.minimum(channel_C, D - 1)[:, None] // GROUP)


@triton.jit
def _adjust(scores_MT, mask, mask_M, token_T, mask_step, seen_T, scaling, softcap, BOOLEAN: tl.constexpr):
    """Scaling, soft cap and mask; tokens that are not `seen` get -inf."""
    scores_MT *= scaling
    if softcap is not None:
        scores_MT = softcap - 2 * softcap / (tl.exp(scores_MT * (2 / softcap)) + 1)  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
    if mask is not None:
        at_MT = mask + mask_M[:, None] + token_T[None, :] * mask_step
        mask_MT = tl.load(at_MT, mask=seen_T[None, :], other=0)
        if BOOLEAN:
            scores_MT = tl.where(mask_MT != 0, scores_MT, float("-inf"))
        else:
            scores_MT += mask_MT.to(tl.float32)
    return tl.where(seen_T[None, :], scores_MT, float("-inf"))


@triton.jit
def _weigh(top_M, total_MT, sum_MC, scores_MT):
    """A step of the running softmax: the new maximum, the totals (added over T at the end), the rescaled sums, and the tile's weights."""
    best_M = tl.maximum(top_M, tl.max(scores_MT, 1))
    base_M = tl.where(best_M == float("-inf"), 0.0, best_M)  # a row that has seen nothing: exp(-inf - 0) is 0
    shrink_M = tl.exp(top_M - base_M)
    weight_MT = tl.exp(scores_MT - base_M[:, None])
    return best_M, total_MT * shrink_M[:, None] + weight_MT, sum_MC * shrink_M[:, None], weight_MT


@triton.jit
def _whole_tokens(
    top_M, total_MT, sum_MC, query_MC, keys, values, begin, count, mask, mask_M, mask_step, scaling, softcap,
    D: tl.constexpr, C: tl.constexpr, T: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    BOOLEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to `count` whole tokens, the first of which is token `begin` of the cache."""
    key_C, key_real_C = _channels(D, C, KEY_BITS)
    value_C, value_real_C = _channels(D, C, VALUE_BITS)
    for start in tl.range(0, count, T, num_stages=1):
        token_T = start + tl.arange(0, T)
        seen_T = token_T < count
        there_CT = seen_T[None, :] & key_real_C[:, None]
        key_CT = tl.load(keys + token_T[None, :] * D + key_C[:, None], mask=there_CT, other=0)
        scores_MT = tl.dot(query_MC, key_CT.to(query_MC.dtype), input_precision=PRECISION)
        scores_MT = _adjust(scores_MT, mask, mask_M, begin + token_T, mask_step, seen_T, scaling, softcap, BOOLEAN)
        top_M, total_MT, sum_MC, weight_MT = _weigh(top_M, total_MT, sum_MC, scores_MT)
        there_TC = seen_T[:, None] & value_real_C[None, :]
        value_TC = tl.load(values + token_T[:, None] * D + value_C[None, :], mask=there_TC, other=0)
        sum_MC = tl.dot(weight_MT.to(query_MC.dtype), value_TC.to(query_MC.dtype), sum_MC, input_precision=PRECISION)
    return top_M, total_MT, sum_MC


@triton.jit
def _packed_tokens(
    top_M, total_MT, sum_MC, query_MC, key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum,
    begin, end, first, mask, mask_M, mask_step, scaling, softcap,
    D: tl.constexpr, C: tl.constexpr, T: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, BOOLEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the packed tokens from `begin` to `end`, which come after `first` whole ones."""
    DTYPE: tl.constexpr = query_MC.dtype
    M: tl.constexpr = query_MC.shape[0]
    GROUPS: tl.constexpr = (T + KEY_GROUP - 1) // KEY_GROUP
    key_C, key_real_C = _channels(D, C, KEY_BITS)
    value_C, _ = _channels(D, C, VALUE_BITS)
    for start in range(begin, end, T):
        token_T = start + tl.arange(0, T)
        seen_T = token_T < end
        token_T = tl.minimum(token_T, end - 1)
        key_CT = _codes(key_codes + token_T * (D * KEY_BITS // 8), D, C, T, KEY_BITS).to(DTYPE)
        scale_CG = _key_groups(key_scale, start, end, key_C, key_real_C, D, GROUPS, KEY_GROUP).to(DTYPE)
        key_CT *= tl.reshape(tl.broadcast_to(scale_CG[:, :, None], (C, GROUPS, T // GROUPS)), (C, T))
        # The minimum of a channel can be far from zero: its product with the query is not to be rounded together with the codes.
        minimum_CG = _key_groups(key_minimum, start, end, key_C, key_real_C, D, GROUPS, KEY_GROUP).to(DTYPE)
        bias_MG = tl.dot(query_MC, minimum_CG, input_precision=PRECISION)
        bias_MT = tl.reshape(tl.broadcast_to(bias_MG[:, :, None], (M, GROUPS, T // GROUPS)), (M, T))
        scores_MT = tl.dot(query_MC, key_CT, bias_MT, input_precision=PRECISION)
        scores_MT = _adjust(scores_MT, mask, mask_M, first + token_T, mask_step, seen_T, scaling, softcap, BOOLEAN)
        top_M, total_MT, sum_MC, weight_MT = _weigh(top_M, total_MT, sum_MC, scores_MT)
        value_CT = _codes(value_codes + token_T * (D * VALUE_BITS // 8), D, C, T, VALUE_BITS).to(DTYPE)
        scale_CT = _value_groups(value_scale, token_T, value_C, D, C, T, VALUE_GROUP).to(DTYPE)
        minimum_CT = _value_groups(value_minimum, token_T, value_C, D, C, T, VALUE_GROUP).to(DTYPE)
        value_TC = tl.trans(tl.fma(value_CT, scale_CT, minimum_CT))
        sum_MC = tl.dot(weight_MT.to(DTYPE), value_TC, sum_MC, input_precision=PRECISION)
    return top_M, total_MT, sum_MC


# Arguments that change from step to step must not lead to another compilation.
@triton.jit(do_not_specialize=["first", "packed", "key_packed", "value_packed", "recent", "share", "new", "mask_batch", "mask_head", "mask_new"])  # fmt: skip
def _attend(
    query, first_keys, first_values, recent_keys, recent_values,
    key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum,
    mask, mask_batch, mask_head, mask_new, mask_step, part_sums, part_tops, part_totals,
    first, packed, key_packed, value_packed, recent, share, heads, new, scaling, softcap,
    R: tl.constexpr, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    BOOLEAN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, s): the attention of a head to all whole tokens (s = 0), or to the s-th share of the packed ones."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_M = tl.minimum(tl.arange(0, M), R - 1)  # padding repeats the last row, and is not stored
    query_head_M = head % heads * (R // new) + row_M // new
    mask_M = head // heads * mask_batch + query_head_M * mask_head + row_M % new * mask_new
    key_C, real_C = _channels(D, C, KEY_BITS)
    query_MC = tl.load(query + (head * R + row_M)[:, None] * D + key_C[None, :], mask=real_C[None, :], other=0)
    query_MC = query_MC.to(DTYPE)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    total_MT = tl.zeros((M, T), tl.float32)
    sum_MC = tl.zeros((M, C), tl.float32)

    if split == 0:
        for last in tl.static_range(2):
            count = recent if last else first
            top_M, total_MT, sum_MC = _whole_tokens(
                top_M, total_MT, sum_MC, query_MC,
                (recent_keys if last else first_keys) + head * count * D, (recent_values if last else first_values) + head * count * D,
                first + packed if last else 0, count, mask, mask_M, mask_step, scaling, softcap,
                D, C, T, KEY_BITS, VALUE_BITS, BOOLEAN, PRECISION,
            )  # fmt: skip
    else:
        key_group = head * (key_packed // KEY_GROUP) * D
        value_group = head * value_packed * (D // VALUE_GROUP)
        begin = (split - 1) * share
        top_M, total_MT, sum_MC = _packed_tokens(
            top_M, total_MT, sum_MC, query_MC,
            key_codes + head * key_packed * (D * KEY_BITS // 8), key_scale + key_group, key_minimum + key_group,
            value_codes + head * value_packed * (D * VALUE_BITS // 8), value_scale + value_group, value_minimum + value_group,
            begin, tl.minimum(begin + share, packed), first, mask, mask_M, mask_step, scaling, softcap,
            D, C, T, KEY_BITS, VALUE_BITS, KEY_GROUP, VALUE_GROUP, BOOLEAN, PRECISION,
        )  # fmt: skip

    part_M = (head * tl.num_programs(1) + split) * R + row_M
    stored_M = tl.arange(0, M) < R
    value_C, real_C = _channels(D, C, VALUE_BITS)
    tl.store(part_sums + part_M[:, None] * D + value_C[None, :], sum_MC, mask=stored_M[:, None] & real_C[None, :])
    tl.store(part_tops + part_M, top_M, mask=stored_M)
    tl.store(part_totals + part_M, tl.sum(total_MT, 1), mask=stored_M)


@triton.jit(do_not_specialize=["splits", "new"])
def _merge(
    part_sums, part_tops, part_totals, sinks, output, splits, heads, new,
    R: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, r): the parts of a row brought to one maximum and added, with the sink's logit in the total. S parts at a time."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    channel_C = tl.arange(0, C)
    sum_C = tl.zeros((C,), tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head % heads * (R // new) + row // new).to(tl.float32)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top, total = float("-inf"), 0.0
    for start in range(0, splits, S):
        split_S = start + tl.arange(0, S)
        there_S = split_S < splits
        part_S = (head * splits + split_S) * R + row
        top_S = tl.load(part_tops + part_S, mask=there_S, other=float("-inf"))
        best = tl.maximum(top, tl.max(top_S, 0))
        base = tl.where(best == float("-inf"), 0.0, best)
        shrink, weight_S = tl.exp(top - base), tl.exp(top_S - base)
        total = total * shrink + tl.sum(weight_S * tl.load(part_totals + part_S, mask=there_S, other=0), 0)
        there_SC = there_S[:, None] & (channel_C < D)[None, :]
        sum_SC = tl.load(part_sums + part_S[:, None] * D + channel_C[None, :], mask=there_SC, other=0)
        sum_C = sum_C * shrink + tl.sum(weight_S[:, None] * sum_SC, 0)
        top = best
    sum_C /= tl.where(total > 0, total, 1.0)  # a row that may attend to nothing gets zeros
    tl.store(output + (head * R + row) * D + channel_C, sum_C.to(output.dtype.element_ty), mask=channel_C < D)


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs keep the device busy."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * PER_PROCESSOR
    return 128 * PER_PROCESSOR


def supports(query: torch.Tensor, keys: Tokens, values: Tokens) -> bool:
    """Whether `attend` takes these shapes."""
    channels = query.shape[-1]
    return (
        16 <= channels <= 256
        and values.recent.shape[-1] == channels
        and (channels & (channels - 1) == 0 or 3 not in (keys.bits, values.bits))
        and keys.group_size in (16, 32, 64, 128)
        and keys.lengths[0] == values.lengths[0]
        and query.shape[1] // keys.recent.shape[1] * query.shape[2] <= MOST_ROWS
    )


def _equally_packed(keys: Tokens, values: Tokens) -> tuple[int, Tokens, Tokens]:
    """How many tokens to read packed in both, and both with what only one of them has packed dequantised into its newest tokens."""
    common = min(keys.lengths[1], values.lengths[1]) // keys.group_size * keys.group_size
    both = []
    for tokens in (keys, values):
        if tokens.lengths[1] > common:
            whole = tokens.dequantized(common, tokens.lengths[1]).to(tokens.recent.dtype)
            tokens = tokens._replace(recent=torch.cat([whole, tokens.recent], -2))
        both.append(tokens)
    return common, both[0], both[1]


def attend(
    query: torch.Tensor,
    keys: Tokens,
    values: Tokens,
    mask: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """The same as `reference.attend`, for what `supports` accepts.

    Products are of float16, added in float32; with float32 queries or scales they are of float32.

    Args:
        query, keys, values, mask, scaling, softcap, sinks: as in `reference.attend`.
        splits: shares of a head's packed tokens; None for as many as fill the device.
    """
    batch, query_heads, new, channels = query.shape
    heads = keys.recent.shape[1]
    rows = query_heads // heads * new
    padded_rows = max(triton.next_power_of_2(rows), 16)
    packed, keys, values = _equally_packed(keys, values)
    if splits is None:
        # A share of one tile would cost as much to merge as to read.
        splits = min(triton.cdiv(_programs(query.device), batch * heads), triton.cdiv(packed, 2 * TILE))
    share = triton.cdiv(triton.cdiv(packed, max(splits, 1)), TILE) * TILE
    splits = triton.cdiv(packed, share) + 1 if packed else 1

    exact = torch.float32 in (query.dtype, keys.packed.scale.dtype, values.packed.scale.dtype)
    sums = query.new_empty(batch * heads, splits, rows, channels, dtype=torch.float32)
    tops, totals = query.new_empty(2, batch * heads, splits, rows, dtype=torch.float32)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    boolean = mask is not None and mask.dtype == torch.bool
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = (mask.view(torch.uint8) if boolean else mask).expand(batch, query_heads, new, sum(keys.lengths))
        strides = mask.stride()
    tensors = (query, keys.first, values.first, keys.recent, values.recent, *keys.packed, *values.packed)
    with torch.accelerator.device_index(query.device.index):
        _attend[batch * heads, splits](
            *(tensor.contiguous() for tensor in tensors),
            mask, *strides, sums, tops, totals,
            keys.lengths[0], packed, keys.lengths[1], values.lengths[1], keys.lengths[2], share, heads, new, scaling, softcap,
            R=rows, M=padded_rows, D=channels, C=triton.next_power_of_2(channels), T=TILE,
            KEY_BITS=keys.bits, VALUE_BITS=values.bits, KEY_GROUP=keys.group_size, VALUE_GROUP=values.group_size,
            BOOLEAN=boolean, DTYPE=tl.float32 if exact else tl.float16, PRECISION=precision(query.device),
            num_warps=4 if padded_rows * channels <= 4096 and not exact else 8, num_stages=2,
        )  # fmt: skip
        _merge[batch * heads, rows](
            sums, tops, totals, None if sinks is None else sinks.contiguous(), output, splits, heads, new,
            R=rows, D=channels, C=triton.next_power_of_2(channels), S=16, num_warps=4,
        )  # fmt: skip
    return output
