"""Where a model runs and in which dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bark_fast.errors import InvalidInput
from bark_fast.numeric import is_whole
from bark_fast.ops.gpus import is_from_ampere_on, number_of

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def pick_device(device: str | int | torch.device) -> torch.device:
    """The device to run on. "auto" is a CUDA GPU when there is one, else the CPU; a number counts GPUs.

    "cuda" is the current GPU, by its number: which one is current depends on the thread that asks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
        if chosen.type == "meta":
            raise TypeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"device {device!r} cannot be used ({reason}); try 'cpu' or 'auto'") from None
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


def pick_replicas(replicas: int | Sequence[str | torch.device]) -> list[torch.device]:
    """The devices of several copies of the model: those named, or the first so many GPUs."""
    if is_whole(replicas):
        found = torch.cuda.device_count()
        if not 1 <= replicas <= found:
            raise InvalidInput(
                f"replicas is {replicas}; as a number it counts GPUs, of which {found} can be seen: "
                f"name devices instead, such as ['cuda:0', 'cuda:1']"
            )
        replicas = [f"cuda:{index}" for index in range(replicas)]
    if isinstance(replicas, (bool, str, bytes)) or not isinstance(replicas, Sequence) or not replicas:
        raise InvalidInput(f"replicas is {replicas!r}; give a list of at least one device, or a number of GPUs")
    places = [pick_device(one) for one in replicas]
    if len(kinds := sorted({place.type for place in places})) > 1:
        raise InvalidInput(
            f"replicas are on {' and '.join(kinds)}; name devices of one kind, on which a text says the same"
        )
    return places


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The weights' dtype. "auto" is float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if is_from_ampere_on(number_of(device)) else torch.float16
        return torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise InvalidInput(f"dtype is {dtype!r}; choose one of auto, {', '.join(_DTYPES)}")
    return chosen
