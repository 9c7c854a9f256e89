"""Linear layers with what stands around them in a pre-norm transformer: LayerNorm, GELU, residual.

Every product accumulates in fp32 and LayerNorm's statistics are fp32. In fp16 and bf16 torch rounds after
every operation. Triton keeps fp32 up to the one rounding of the result, with two exceptions: a tensor-core
product wants the normalised row in the weight's dtype, so there it is rounded, as torch rounds it, and what
cuBLAS multiplies is rounded before GELU or residual. Which kernel runs depends on the number of rows (see
kernels/norm_linear.py), so a row's last bits may depend on how many rows run beside it. fp32 is multiplied as
TF32 only where `torch.backends.cuda.matmul.fp32_precision` (or `allow_tf32`) asks for it; what streams its
weights past a few rows keeps to fp32 even then, which costs nothing there.

On the CPU the compiled extension takes up to `COMPILED_ROWS` rows (`dispatch.prefer("torch")` keeps it out):
weights are read once, everything is fp32 up to the one rounding of the result (but on AMD's CPUs with AVX-512
BF16 a normalised row of bfloat16 is rounded before it is multiplied, as torch rounds it), and a row's bits
depend neither on the rows beside it nor on their number nor on the threads. More rows it takes where it
multiplies faster than torch (`dispatch.multiplies_faster`); again a row's bits do not depend on the others. No
operation has a gradient there.

Errors: `InvalidInput` where dtypes or sizes do not fit together.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bark_fast import extension
from bark_fast.errors import InvalidInput
from bark_fast.ops import reference
from bark_fast.ops.dispatch import all_plain, define, is_eager, multiplies_faster, preferred, uses_triton

Scratch = tuple[Tensor, Tensor]
"""Partial sums (fp32) and counters (int32, zero between calls), from `linear_scratch`."""

FLOATING = (torch.float32, torch.float16, torch.bfloat16)

COMPILED_ROWS = 16
"""Rows up to which the extension multiplies on the CPU.

One thread of a Sapphire Rapids, torch without LayerNorm, GELU and residual: fp32 takes 1.8 to 2 times less time
than torch at 4 and 8 rows, 1.4 at 16. bf16 is level with torch near 10 rows and 1.3 times slower at 16: there
one order of sums for all row counts was worth more. On a Zen 4 it takes 1.4 times less time than torch at 16.
"""


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """act(LayerNorm(x) @ weight.T + bias), eps 1e-5, act the exact GELU or nothing: (..., n) in x's dtype.

    x: (..., k), rows any stride apart. norm_weight, norm_bias: (k,), bias None for none. weight: (n, k) in x's
    dtype, as torch.nn.Linear keeps it, rows any stride apart; `weight[low:high]` computes those outputs only.
    bias: (n,). scratch: from `linear_scratch`; without it, calls of a few rows allocate. pdl: programmatic
    dependent launch on a GPU of compute capability 9 or later; ignored by torch and cuBLAS.
    """
    check(x, weight, bias, norm_weight, norm_bias)
    partials, counters = scratch or (None, None)
    if is_eager(x):
        return _norm_linear(x, norm_weight, norm_bias, weight, bias, gelu, partials, counters, pdl)
    result: Tensor = torch.ops.bark_fast.norm_linear(
        x, norm_weight, norm_bias, weight, bias, gelu, partials, counters, pdl
    )
    return result


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """act(x @ weight.T + bias): (..., n) in x's dtype. Arguments as in `norm_linear`."""
    check(x, weight, bias)
    partials, counters = scratch or (None, None)
    if is_eager(x):
        return _linear(x, weight, bias, None, gelu, partials, counters, pdl)
    result: Tensor = torch.ops.bark_fast.linear(x, weight, bias, None, gelu, partials, counters, pdl)
    return result


def linear_residual(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual + x @ weight.T + bias: (..., n) in x's dtype, a new tensor.

    residual: (..., n) in x's dtype, rows any stride apart. Other arguments as in `norm_linear`.
    """
    check(x, weight, bias)
    if residual.shape != (*x.shape[:-1], len(weight)) or residual.dtype != x.dtype:
        raise InvalidInput(
            f"residual is {tuple(residual.shape)} {residual.dtype}; it must be "
            f"{(*x.shape[:-1], len(weight))} {x.dtype}, as x @ weight.T is"
        )
    partials, counters = scratch or (None, None)
    if is_eager(x):
        return _linear(x, weight, bias, residual, False, partials, counters, pdl)
    result: Tensor = torch.ops.bark_fast.linear(x, weight, bias, residual, False, partials, counters, pdl)
    return result


def linear_scratch(rows: int, features: int, device: torch.device | str) -> Scratch | None:
    """Scratch for all calls of up to `rows` rows and `features` outputs on one stream; None where none is used.

    Made once, it keeps an allocation and a memset out of a captured decode step.
    """
    place = torch.empty(0, device=device)
    if not uses_triton(place):
        return None
    from bark_fast.kernels import norm_linear as kernels

    made: Scratch = kernels.make_scratch(rows, features, place.device)
    return made


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> None:
    """Raise `InvalidInput` where a linear layer's dtypes or sizes do not fit together."""
    if x.dtype not in FLOATING or weight.dtype != x.dtype:
        raise InvalidInput(
            f"x is {x.dtype} and weight {weight.dtype}; both must be one of {', '.join(map(str, FLOATING))}"
        )
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidInput(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; x must be (..., k) and weight (n, k)"
        )
    vectors = (
        ("bias", bias, weight.shape[0]),
        ("norm_weight", norm_weight, weight.shape[1]),
        ("norm_bias", norm_bias, weight.shape[1]),
    )
    for name, vector, size in vectors:
        if vector is not None and vector.shape != (size,):
            raise InvalidInput(f"{name} is {tuple(vector.shape)}; beside this weight it must be ({size},)")


def rows_of(x: Tensor) -> Tensor:
    """x (..., k) as (rows, k) with neighbouring columns; a copy only where strides cannot say that.

    A view that negates what lies in memory is copied as well.
    """
    flat = x.resolve_neg().reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def extension_for(x: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The extension where it takes this call, else None: on the CPU, one dtype, adjacent columns."""
    if not x.is_cpu or preferred() != "auto" or not x.numel():
        return None
    module = extension.load()
    if module is None or not (has_few_rows(x) or multiplies_faster(module, x.dtype)):
        return None
    return module if all_plain(x.dtype, others) else None


def has_few_rows(x: Tensor) -> bool:
    """Whether these are as few as the extension takes in every dtype, and in all its operations."""
    return x.numel() <= COMPILED_ROWS * x.shape[-1]


def with_adjacent_columns(weight: Tensor) -> Tensor:
    """The weight itself where its columns are neighbours, as torch.nn.Linear and its row slices have them."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor,
    bias: Tensor | None = None, gelu: bool = False, partials: Tensor | None = None,
    counters: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    if uses_triton(x):
        from bark_fast.kernels import norm_linear as kernels

        y: Tensor = kernels.linear(
            rows_of(x), with_adjacent_columns(weight), bias, norm=(norm_weight, norm_bias), gelu=gelu,
            scratch=None if partials is None or counters is None else (partials, counters), pdl=pdl,
        )  # fmt: skip
        return y.view(*x.shape[:-1], len(weight))
    if module := extension_for(x, norm_weight, norm_bias, weight, bias):
        y = x.new_empty(*x.shape[:-1], len(weight))
        module.linear(
            rows_of(x), norm_weight, norm_bias, weight, bias, None, rows_of(y), gelu, torch.get_num_threads()
        )  # fmt: skip
        return y
    y = reference.linear(reference.layer_norm(x, norm_weight, norm_bias), weight, bias)
    return reference.gelu(y) if gelu else y


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False,
    partials: Tensor | None = None, counters: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    if uses_triton(x):
        from bark_fast.kernels import norm_linear as kernels

        y: Tensor = kernels.linear(
            rows_of(x), with_adjacent_columns(weight), bias,
            residual=None if residual is None else rows_of(residual), gelu=gelu,
            scratch=None if partials is None or counters is None else (partials, counters), pdl=pdl,
        )  # fmt: skip
        return y.view(*x.shape[:-1], len(weight))
    if module := extension_for(x, weight, bias):
        y = x.new_empty(*x.shape[:-1], len(weight))
        module.linear(
            rows_of(x), None, None, weight, bias, None if residual is None else rows_of(residual), rows_of(y),
            gelu, torch.get_num_threads(),
        )  # fmt: skip
        return y
    y = reference.linear(x, weight, bias)
    if gelu:
        y = reference.gelu(y)
    return y if residual is None else residual + y


def _fake_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor,
    bias: Tensor | None = None, gelu: bool = False, partials: Tensor | None = None,
    counters: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False,
    partials: Tensor | None = None, counters: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0])


define(
    "norm_linear(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias=None, "
    "bool gelu=False, Tensor(a!)? partials=None, Tensor(b!)? counters=None, bool pdl=False) -> Tensor",
    _norm_linear,
    _fake_norm_linear,
)
define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, bool gelu=False, "
    "Tensor(a!)? partials=None, Tensor(b!)? counters=None, bool pdl=False) -> Tensor",
    _linear,
    _fake_linear,
)
