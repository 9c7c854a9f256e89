"""What the machine code of a kernel must have, by the kernel's name: no launch is excused."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch

HALVES = {torch.float16, torch.bfloat16}
PRODUCTS = {"_attention_kernel", "_prefill_kernel", "_matmul_kernel", "_head_sample_kernel"}

WIDE_SHARE = {
    "_gemv_kernel": 0.9,
    "_matmul_kernel": 0.9,
    "_layer_norm_kernel": 0.9,
    "_epilogue_kernel": 0.9,
    # beside their data these read rules, ids, page tables, slots or masks, which are narrow
    "_head_sample_kernel": 0.4,
    "_attention_kernel": 0.6,
    "_prefill_kernel": 0.8,
    "_decode_kernel": 0.85,
    "_append_kernel": 0.75,
    "_gather_kernel": 0.75,
    "_copy_kernel": 0.6,
    "_embed_kernel": 0.6,
    "_embed_codes_kernel": 0.65,
    # book-keeping, and logits, which are few beside the weights they come from
    "_advance_kernel": 0.0,
    "_exponential_kernel": 0.0,
    "_sample_kernel": 0.0,
}
"""Least share of the bytes a kernel loads that must come 128 bits at a time (`sass.wide_share`)."""


def wants_tensor_cores(kernel: str, dtypes: Set[torch.dtype], constants: Mapping[str, object]) -> bool:
    """Whether it multiplies matrices in 16 bits or TF32."""
    short = bool(HALVES & dtypes) or constants.get("PRECISION") == "tf32"
    return short and _multiplies(kernel, constants)


def wants_ampere(kernel: str, dtypes: Set[torch.dtype], constants: Mapping[str, object]) -> bool:
    """Whether operations take torch in its place on older GPUs, see `bark_fast.ops.gpus`."""
    return torch.bfloat16 in dtypes or _multiplies(kernel, constants)


def _multiplies(kernel: str, constants: Mapping[str, object]) -> bool:
    """One row of a head is multiplied out in registers."""
    return kernel in PRODUCTS and constants.get("ROWS") != 1
