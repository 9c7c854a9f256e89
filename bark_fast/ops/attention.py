"""Attention over contiguous keys and values: fine windows, prompts, the passes of a patched model.

Triton is the flash algorithm of Dao (2023), products and softmax in float32 whatever the dtype; torch is
`scaled_dot_product_attention`, whose backends choose their own. On the CPU the extension has the same
algorithm, for calls without a mask, where it is faster than torch; where the CPU multiplies bfloat16, it rounds
softmax's weights to that, as torch does. None has a gradient here: results are not connected to inputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bark_fast import extension
from bark_fast.errors import InvalidInput
from bark_fast.ops.dispatch import (
    HEAD_DIMS,
    all_plain,
    define,
    is_eager,
    multiplies_faster,
    preferred,
    uses_triton,
)

FEWEST_ROWS = 8
"""Queries from which on the extension is faster than torch: below, most of its vectors' lanes have none."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of every query over the keys it may see: (batch, heads, time, head_dim).

    query: (batch, heads, time, head_dim). key, value: (batch, heads, keys, head_dim). Strides are free but for
    a unit last one: views of a packed projection (batch, time, 3, heads, head_dim) are read in place. All of
    one dtype; Triton wants float32, float16 or bfloat16, and head_dim 32, 64 or 128 (others run on torch).

    causal: aligned bottom-right, the last query sees every key; keys >= time. lengths: (batch,) int32 or int64,
    keys from there on are absent. key_mask: (batch, keys) bool, False where a key is absent (a padded prompt).
    What lies at an absent key does not matter; a query that sees no key gives zeros. scale: positive,
    head_dim ** -0.5 unless given. out: where to write; without it Triton's result is a view of memory laid out
    (batch, time, heads, head_dim), so that `transpose(1, 2)` and merging the heads copy nothing.
    """
    _check(query, key, value, causal, key_mask, lengths, scale, out)
    natural = query.shape[-1] ** -0.5 if scale is None else scale
    if is_eager(query) and not uses_triton(query, query.shape[3], multiplies=True):
        seen = _by_extension(query, key, value, causal, key_mask, lengths, natural, out)
        if seen is not None:
            return seen
        seen = reference(query, key, value, causal, key_mask, lengths, scale)
        return seen if out is None else out.copy_(seen)
    out = _merged_heads(query) if out is None else out
    if is_eager(query):
        _attention(query, key, value, causal, key_mask, lengths, natural, out)
    else:
        torch.ops.bark_fast.attention(query, key, value, causal, key_mask, lengths, natural, out)
    return out


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention` in plain torch, in the dtype of its inputs."""
    time, keys = query.shape[-2], key.shape[-2]
    visible = None
    masked = key_mask is not None or lengths is not None
    if causal and (masked or 1 < time < keys):
        visible = torch.ones(time, keys, dtype=torch.bool, device=query.device).tril(keys - time)
    if masked:
        present = torch.ones(1, keys, dtype=torch.bool, device=query.device)
        if lengths is not None:
            present = present & (torch.arange(keys, device=query.device) < lengths[:, None])
        if key_mask is not None:
            present = present & key_mask
        present = present[:, None, None]
        visible = present if visible is None else visible & present
        absent = ~present.transpose(2, 3)
        key, value = key.masked_fill(absent, 0), value.masked_fill(absent, 0)  # weight 0 times NaN would be NaN
    if visible is None:
        square = causal and time == keys and time > 1
        return scaled_dot_product_attention(query, key, value, is_causal=square, scale=scale)
    seen = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    if visible.dim() == 4:
        seen = seen.where(visible.any(-1, keepdim=True), 0.0)  # torch may give NaN to a query that sees nothing
    return seen


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    out: Tensor | None,
) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise InvalidInput(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; "
            "both must be (batch, heads, time, head_dim)"
        )
    batch, heads, time, head_dim = query.shape
    keys = key.shape[2]
    for name, tensor, shape, dtypes in (
        ("key", key, (batch, heads, keys, head_dim), (query.dtype,)),
        ("value", value, (batch, heads, keys, head_dim), (query.dtype,)),
        ("out", out, (batch, heads, time, head_dim), (query.dtype,)),
        ("key_mask", key_mask, (batch, keys), (torch.bool,)),
        ("lengths", lengths, (batch,), (torch.int32, torch.int64)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if tensor is not None and tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InvalidInput(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {expected}")
    if causal and keys < time:
        raise InvalidInput(f"there are {keys} keys for {time} queries; causal attention needs as many or more")
    if scale is not None and not scale > 0:
        raise InvalidInput(f"scale is {scale}; it must be positive")


def _merged_heads(query: Tensor) -> Tensor:
    batch, heads, time, head_dim = query.shape
    return query.new_empty(batch, time, heads, head_dim).transpose(1, 2)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    if not uses_triton(query, query.shape[3], multiplies=True):
        if _by_extension(query, key, value, causal, key_mask, lengths, scale, out) is None:
            out.copy_(reference(query, key, value, causal, key_mask, lengths, scale))
        return
    from bark_fast.kernels import attention as kernels

    _check_triton(query, key, value, out)
    kernels.attention(query, key, value, causal, key_mask, lengths, scale, out)


def _by_extension(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    out: Tensor | None,
) -> Tensor | None:
    """`attention` by the extension; None where it does not take the call."""
    if not query.is_cpu or preferred() != "auto" or key_mask is not None or lengths is not None:
        return None
    if query.shape[2] < FEWEST_ROWS or query.shape[3] not in HEAD_DIMS or not key.shape[2]:
        return None
    module = extension.load()
    if module is None or not attends_faster(module, query.dtype):
        return None
    if not all_plain(query.dtype, (query, key, value)) or (out is not None and out.stride(3) != 1):
        return None
    out = _merged_heads(query) if out is None else out
    module.flash(query, key, value, out, causal, scale, torch.get_num_threads())
    return out


def attends_faster(module: ModuleType, dtype: torch.dtype) -> bool:
    """Whether the extension does here. In bfloat16 torch multiplies widened numbers on CPUs without AMX."""
    if dtype == torch.bfloat16 and module.isa() == "avx512bf16":
        return not module.cpu_is_intels()
    return multiplies_faster(module, dtype)


def _check_triton(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    head_dim = query.shape[3]
    if head_dim not in HEAD_DIMS:
        raise InvalidInput(
            f"head_dim is {head_dim}; Triton attention has 32, 64 and 128 (prefer('torch') has all)"
        )
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidInput(f"query is {query.dtype}; Triton attention takes float32, float16 and bfloat16")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        if tensor.stride(3) != 1:
            raise InvalidInput(f"{name} has last stride {tensor.stride(3)}; it must be 1: make it contiguous")


def _writes_out(*arguments: object) -> None:
    """What the operator is to a tracer: it writes `out` and returns nothing."""


define(
    "attention(Tensor query, Tensor key, Tensor value, bool causal, Tensor? key_mask, Tensor? lengths, "
    "float scale, Tensor(a!) out) -> ()",
    _attention,
    _writes_out,
)
