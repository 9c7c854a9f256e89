from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

interface: int

class BuildInfo(TypedDict):
    compiler: str
    isas: list[str]
    cuda_archs: list[str]
    no_cuda: str

def build_info() -> BuildInfo: ...

class PoolStats:
    @property
    def pages_total(self) -> int: ...
    @property
    def pages_used(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
    @property
    def pages_shared(self) -> int: ...
    @property
    def tokens_live(self) -> int: ...
    @property
    def tokens_reserved(self) -> int: ...
    @property
    def tokens_waste(self) -> int: ...
    @property
    def sequences(self) -> int: ...

class PagePool:
    def __init__(self, num_pages: int, page_size: int) -> None: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    def create(self) -> int: ...
    def extend(self, handle: int, n: int) -> tuple[int, int] | None: ...
    def truncate(self, handle: int, length: int) -> None: ...
    def fork(self, handle: int, length: int | None = None) -> int: ...
    def free(self, handle: int) -> None: ...
    def length(self, handle: int) -> int: ...
    def pages(self, handle: int) -> NDArray[np.int32]: ...
    def reference_counts(self) -> NDArray[np.int32]: ...
    def stats(self) -> PoolStats: ...
    def pages_needed(self, handles: NDArray[np.int64], n_new: NDArray[np.int32]) -> int: ...
    def can_extend(self, handles: NDArray[np.int64], n_new: NDArray[np.int32]) -> bool: ...
    def step(
        self,
        handles: NDArray[np.int64],
        n_new: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slots: NDArray[np.int64],
        lengths: NDArray[np.int32],
    ) -> NDArray[np.int32]: ...

def cuda_fault(device: int) -> str: ...
def append_kv(
    qkv: object, k_pages: object, v_pages: object, slots: object, threads: int, stream: int
) -> None: ...
def paged_attention(
    query: object,
    k_pages: object,
    v_pages: object,
    block_table: object,
    lengths: object,
    query_starts: object,
    out: object,
    scale: float,
    partials: object,
    counters: object,
    threads: int,
    stream: int,
) -> None: ...
def append_attention(
    qkv: object,
    k_pages: object,
    v_pages: object,
    block_table: object,
    lengths: object,
    query_starts: object,
    slots: object,
    out: object,
    scale: float,
    partials: object,
    counters: object,
    threads: int,
    stream: int,
) -> None: ...
def copy_pages(k_pages: object, v_pages: object, pairs: object, threads: int, stream: int) -> None: ...
def gather_kv(
    pages: object, block_table: object, length: int, out: object, threads: int, stream: int
) -> None: ...
def swap_pages(source: object, destination: object, pairs: object, threads: int, stream: int) -> None: ...

linear_rows: int

def bf16_in_pairs() -> bool: ...
def flash(
    query: object, key: object, value: object, out: object, causal: bool, scale: float, threads: int
) -> None: ...
def linear(
    x: object,
    norm_weight: object,
    norm_bias: object,
    weight: object,
    bias: object,
    residual: object,
    out: object,
    gelu: bool,
    threads: int,
    scales: object = ...,
) -> None: ...
def mlp(
    x: object,
    norm_weight: object,
    norm_bias: object,
    fc_weight: object,
    fc_bias: object,
    proj_weight: object,
    proj_bias: object,
    out: object,
    threads: int,
) -> None: ...
def decode_layers(
    x: object,
    weights: list[object],
    keys: list[object],
    values: list[object],
    block_table: object,
    lengths: object,
    query_starts: object,
    slots: object,
    out: object,
    scale: float,
    threads: int,
    scales: list[object] = ...,
) -> None: ...
def philox_uniform(seed: int, stream: int, chunk: int, first_step: int, out: object) -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def cpu_kind() -> str: ...
def use_cpu_kind(name: str) -> None: ...
def cpu_is_intels() -> bool: ...
def parallel_backend() -> str: ...
def avoid_openmp(avoid: bool) -> None: ...
