"""CUDA graphs of one device: what they share, and how one is captured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock

import torch

from bark_fast.ops.gpus import number_of

ONE_CAPTURE = Lock()
"""torch captures one graph at a time in a process; replicas have threads of their own."""


@dataclass(frozen=True)
class Capture:
    """A step captured as a CUDA graph: for how many rows, and the seconds and bytes that took."""

    model: str
    rows: int
    seconds: float
    bytes: int


class CaptureFailed(RuntimeError):
    """CUDA could not capture what it can carry out."""


class GraphMemory:
    """Memory of graphs that never run at the same time, and the stream that all of them are captured on.

    torch keeps free memory by stream, and its own stream for captures is on one device, the first. It deals out
    streams in turns, 32 of each priority: one of another priority is no runner's, whose launches from another
    thread would be recorded and not carried out.

    failed: whether a capture did. None is tried after it, since torch's allocator may take one that CUDA broke
    off as still under way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.failed = False

    def capture(self, step: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph of `step`, and the bytes it took. The device must be the current one.

        The step runs twice before, so that what is allocated or compiled once is not captured: on the current
        stream, so that the room cuBLAS has for each stream is made in the capture, and is the graphs'. Raises
        CaptureFailed where CUDA cannot capture; the current stream is then what it was.
        """
        stream = torch.cuda.current_stream(self.device)
        step()
        step()
        try:
            with ONE_CAPTURE:
                # as torch does before a capture: it would be missing from what the graph took; of all devices,
                # it fails while one captures
                torch.cuda.empty_cache()
                held = torch.cuda.memory_reserved(self.device)
                graph = torch.cuda.CUDAGraph()
                # What torch keeps of its generators from the first capture on must be no inference tensor, or
                # others' captures could not write to it. Threads at work on other devices may allocate.
                with (
                    nothing_collected(),
                    torch.inference_mode(False),
                    torch.cuda.graph(graph, self.pool, self.side, "thread_local"),
                    torch.inference_mode(),
                ):
                    step()
        except RuntimeError as error:
            self.failed = True
            torch.cuda.set_stream(stream)  # torch leaves the capture's the current one if ending it fails
            self._leave_capture()
            raise CaptureFailed(str(error)) from error
        return graph, torch.cuda.memory_reserved(self.device) - held

    def _leave_capture(self) -> None:
        """Before 2.13 torch leaves its allocator and its generator in a capture that could not be ended.

        Emptying its cache, and every draw on the device, would be errors from then on.
        """
        if torch.__version__ >= "2.13":
            return
        gpu = number_of(self.device)
        with suppress(RuntimeError):  # it had not begun
            torch._C._cuda_endAllocateToPool(gpu, self.pool)
        generator = torch.cuda.default_generators[gpu]
        generator.graphsafe_set_state(generator.clone_state())  # a copy is in no capture


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Kernels that Python's collector frees, anybody's, are unloaded then and there, which ends a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
