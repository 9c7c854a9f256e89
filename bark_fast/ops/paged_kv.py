"""Operations on a paged key-value cache, on the CPU and on CUDA.

K and V of one layer are tensors (num_pages, n_head, page_size, head_dim), contiguous, of one dtype (float32,
float16 or bfloat16); page_size is 16, 32 or 64, head_dim 32, 64 or 128. A token's slot is page * page_size +
offset. A sequence's row of a block table lists its pages in order; entries past its last token are not read.

Called eagerly the functions go straight to the compiled extension. Where it lacks the device, Triton runs on a
GPU and the plain torch of `paged_kv_reference` elsewhere; `dispatch.prefer` forces either of them. Under
torch.compile and other tracers they go to the operators `torch.ops.bark_fast.*`, which are registered with
torch.library when this module is imported.

Errors. On the CPU every argument is checked before anything is written: dtype, device, shape, strides, and each
slot, length, row range and table entry that will be used; what is wrong raises ValueError with its name, value
and bound. On CUDA the tables lie on the device and are not read back: a slot or pair out of range is skipped, a
key on a page out of range counts as absent, a gathered token there becomes zeros. Nothing out of range is ever
followed. CUDA also wants addresses and row strides in multiples of 16 bytes. No operation has a gradient.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bark_fast import extension
from bark_fast.ops import paged_kv_reference as fallback
from bark_fast.ops.dispatch import HEAD_DIMS, define, is_eager, preferred, uses_triton, writes_in_place

MAX_PARTS = 32
"""Parts a context is split into at most on CUDA; `attention_scratch` has room for them."""

SCHEMAS = {
    "append_kv": "(Tensor qkv, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()",
    "paged_attention": (
        "(Tensor query, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, "
        "Tensor query_starts, Tensor(a!) out, float scale, Tensor(b!)? partials=None, "
        "Tensor(c!)? counters=None) -> ()"
    ),
    "append_attention": (
        "(Tensor qkv, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor lengths, "
        "Tensor query_starts, Tensor slots, Tensor(c!) out, float scale, Tensor(d!)? partials=None, "
        "Tensor(e!)? counters=None) -> ()"
    ),
    "copy_pages": "(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor pairs) -> ()",
    "gather_kv": "(Tensor pages, Tensor block_table, SymInt length, Tensor(a!) out) -> ()",
    "swap_pages": "(Tensor source, Tensor(a!) destination, Tensor pairs) -> ()",
}


@cache
def compiled(gpu: int | None) -> ModuleType | None:
    """The extension, if it runs these operations on this GPU, None the CPU; else Triton or plain torch does.

    A GPU or driver that its CUDA part was not made for is no error: it is just not used there. Raises
    RuntimeError where the GPU has no memory left for its code.
    """
    module = extension.load()
    fault = "" if module is None or gpu is None else module.cuda_fault(gpu)
    if "out of memory" in fault:  # it may pass: nothing is remembered
        raise RuntimeError(f"the CUDA part of bark_fast._C does not load on cuda:{gpu}: {fault}")
    return None if fault else module


def append_kv(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Store the keys and values of new tokens in their pages.

    qkv: (rows, 3 * n_head * head_dim), the packed projection q | k | v, rows any stride apart. slots: (rows,)
    int64; -1 skips a row. Slots must be distinct: of two rows for one slot either may stay.
    """
    if is_eager(k_pages):
        _append_kv(qkv, k_pages, v_pages, slots)
    else:
        torch.ops.bark_fast.append_kv(qkv, k_pages, v_pages, slots)


def paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    out: Tensor,
    scale: float | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of each query row over the keys it may see, written to `out`, which is returned.

    query: (rows, n_head, head_dim), rows any stride apart (a slice of the packed projection will do).
    block_table: (seqs, columns) int32. lengths: (seqs,) int32, keys of each sequence, the new ones included.
    query_starts: (seqs + 1,) int32, 0 to rows: rows [query_starts[s], query_starts[s + 1]) belong to sequence s
    and are its last tokens (causal, aligned bottom-right; rows before the first key give zeros). out: (rows,
    n_head * head_dim). scale: head_dim ** -0.5 unless given.

    Products are summed in float32 whatever the dtype; the softmax is online (Milakov & Gimelshein, 2018). A
    context is split over threads or blocks when there are few (sequence, head) pairs. On CUDA that needs
    `scratch`, from `attention_scratch`, which calls on one stream may share; the split follows from shapes
    alone, so a captured graph stays right when lengths change. At most 65,535 rows on CUDA.
    """
    if scale is None:
        scale = k_pages.shape[-1] ** -0.5
    partials, counters = scratch or (None, None)
    arguments = (query, k_pages, v_pages, block_table, lengths, query_starts, out, scale, partials, counters)
    if is_eager(k_pages):
        _paged_attention(*arguments)
    else:
        torch.ops.bark_fast.paged_attention(*arguments)
    return out


def append_attention(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    out: Tensor,
    scale: float | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`append_kv`, then `paged_attention` of the same rows; on a GPU in one launch.

    qkv: (rows, 3 * n_head * head_dim), the packed projection q | k | v, rows any stride apart. slots: (rows,)
    int64, where the table puts each row's token, all distinct; -1 for a row that is to be ignored: nothing of
    it is stored, and its result means nothing. The other arguments, and the result, as in `paged_attention`.
    """
    if scale is None:
        scale = k_pages.shape[-1] ** -0.5
    partials, counters = scratch or (None, None)
    arguments = (
        qkv, k_pages, v_pages, block_table, lengths, query_starts, slots, out, scale, partials, counters,
    )  # fmt: skip
    if is_eager(k_pages):
        _append_attention(*arguments)
    else:
        torch.ops.bark_fast.append_attention(*arguments)
    return out


def attention_scratch(
    rows: int, n_head: int, head_dim: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Room to split contexts on CUDA, for calls of up to `rows` rows: partial results, counters."""
    pairs, place = rows * n_head, torch.device(device)
    parts = MAX_PARTS * pairs
    if place.type == "cuda":  # p pairs are split into ceil(2 * processors / p) parts each, if at all
        parts = min(parts, 4 * torch.cuda.get_device_properties(place).multi_processor_count)
    partials = torch.empty(parts * (head_dim + 2), dtype=torch.float32, device=place)
    return partials, torch.zeros(pairs, dtype=torch.int32, device=place)


def copy_pages(k_pages: Tensor, v_pages: Tensor, pairs: Tensor) -> None:
    """Copy whole pages within K and V. pairs: (n, 2) int32 of (source, destination), carried out in order."""
    if is_eager(k_pages):
        _copy_pages(k_pages, v_pages, pairs)
    else:
        torch.ops.bark_fast.copy_pages(k_pages, v_pages, pairs)


def gather_kv(pages: Tensor, block_table: Tensor, length: int, out: Tensor | None = None) -> Tensor:
    """The first `length` tokens of one sequence, contiguous: (n_head, length, head_dim), in `out` if given.

    pages: K or V pages. block_table: (columns,) int32, the sequence's row.
    """
    if out is None:
        out = pages.new_empty(pages.shape[1], max(length, 0), pages.shape[3])
    if is_eager(pages):
        _gather_kv(pages, block_table, length, out)
    else:
        torch.ops.bark_fast.gather_kv(pages, block_table, length, out)
    return out


def swap_pages(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Copy pages between two caches of one geometry, device to host, host to device or within one.

    pairs: (n, 2) int32 on the CPU, (page of source, page of destination). With CUDA the copies are enqueued on
    the device's current stream; host memory must be pinned for them to overlap, and kept, and left alone, until
    they are done.
    """
    if is_eager(source):
        _swap_pages(source, destination, pairs)
    else:
        torch.ops.bark_fast.swap_pages(source, destination, pairs)


def run_in_torch(pages: Tensor) -> bool:
    """Whether operations on these pages run in plain torch, which has to read tables that lie on a GPU."""
    return _extension(pages) is None and not uses_triton(pages, pages.shape[-1])


def _extension(pages: Tensor) -> ModuleType | None:
    if preferred() != "auto" or pages.device.type not in ("cpu", "cuda") or pages.shape[-1] not in HEAD_DIMS:
        return None
    return compiled(pages.device.index if pages.is_cuda else None)


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def _append_kv(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    module = _extension(k_pages)
    if module is None:
        if not uses_triton(k_pages, k_pages.shape[-1]):
            return fallback.append_kv(qkv, k_pages, v_pages, slots)
        from bark_fast.kernels import paged_kv as kernels

        fallback.check_append(qkv, k_pages, v_pages, slots)
        kernels.append_kv(qkv, k_pages, v_pages, slots)
        return None
    module.append_kv(qkv, k_pages, v_pages, slots, torch.get_num_threads(), _stream(k_pages))
    return None


def _paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    out: Tensor,
    scale: float,
    partials: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    module = _extension(k_pages)
    arguments = (query, k_pages, v_pages, block_table, lengths, query_starts, out, scale)
    if module is None:
        if not uses_triton(k_pages, k_pages.shape[-1]):
            return fallback.paged_attention(*arguments)
        from bark_fast.kernels import paged_kv as kernels

        fallback.check_attention(*arguments[:-1])
        kernels.paged_attention(*arguments, partials, counters)
        return None
    module.paged_attention(*arguments, partials, counters, torch.get_num_threads(), _stream(k_pages))
    return None


def _append_attention(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    out: Tensor,
    scale: float,
    partials: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    module = _extension(k_pages)
    arguments = (qkv, k_pages, v_pages, block_table, lengths, query_starts, slots, out, scale)
    if module is None:
        if not uses_triton(k_pages, k_pages.shape[-1]):
            return fallback.append_attention(*arguments)
        from bark_fast.kernels import paged_kv as kernels

        fallback.check_append(qkv, k_pages, v_pages, slots)
        query = fallback.queries(qkv, k_pages)
        fallback.check_attention(query, k_pages, v_pages, block_table, lengths, query_starts, out)
        kernels.paged_attention(
            query, k_pages, v_pages, block_table, lengths, query_starts, out, scale, partials, counters, slots
        )
        return None
    module.append_attention(*arguments, partials, counters, torch.get_num_threads(), _stream(k_pages))
    return None


def _copy_pages(k_pages: Tensor, v_pages: Tensor, pairs: Tensor) -> None:
    module = _extension(k_pages)
    if module is None:
        if not uses_triton(k_pages, k_pages.shape[-1]):
            return fallback.copy_pages(k_pages, v_pages, pairs)
        from bark_fast.kernels import paged_kv as kernels

        fallback.check_copy(k_pages, v_pages, pairs)
        kernels.copy_pages(k_pages, v_pages, pairs)
        return None
    module.copy_pages(k_pages, v_pages, pairs, torch.get_num_threads(), _stream(k_pages))
    return None


def _gather_kv(pages: Tensor, block_table: Tensor, length: int, out: Tensor) -> None:
    module = _extension(pages)
    if module is None:
        if not uses_triton(pages, pages.shape[-1]):
            return fallback.gather_kv(pages, block_table, length, out)
        from bark_fast.kernels import paged_kv as kernels

        fallback.check_gather(pages, block_table, length, out)
        kernels.gather_kv(pages, block_table, length, out)
        return None
    module.gather_kv(pages, block_table, length, out, torch.get_num_threads(), _stream(pages))
    return None


def _swap_pages(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    on_device = source if source.is_cuda else destination
    module = _extension(on_device)
    between_gpus = source.is_cuda and destination.is_cuda and source.device != destination.device
    if module is None or between_gpus:  # torch orders both GPUs' work; the extension knows one stream
        return fallback.swap_pages(source, destination, pairs)
    module.swap_pages(source, destination, pairs, torch.get_num_threads(), _stream(on_device))
    return None


for _name, _signature in SCHEMAS.items():
    define(_name + _signature, globals()[f"_{_name}"], writes_in_place)
