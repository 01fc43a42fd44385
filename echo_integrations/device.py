"""Devices, dtypes, memory and forked processes: what torch can do on this machine. Knows nothing of models."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_integrations.config import ModelLoadError

_forked = False


def _remember_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)


def is_forked() -> bool:
    """Whether this process was forked from one that had loaded this module."""
    return _forked


def advice_after_fork() -> str:
    """What to say of an error in a forked process; nothing in others."""
    return "; a forked process cannot use the GPU of its parent: start workers with 'spawn'" if _forked else ""


def choose_device(device: str | None) -> torch.device:
    """The device that a setting means.

    Raises:
        ModelLoadError: there is no such device here.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelLoadError(
            f"device {device!r} cannot be used here ({error}): name another, or leave device out for the best one"
            + advice_after_fork()
        ) from error


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting means: ``auto`` is bfloat16 where the hardware multiplies it, else float32.

    Example:
        >>> choose_dtype("float16", torch.device("cpu"))
        torch.float16
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cpu":
        fast = cpu_multiplies_bfloat16()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.bfloat16 if fast else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has AMX-BF16 or AVX512-BF16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe() for probe in probes if probe is not None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory", "not enough memory")
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; nobody waits for what the device is doing.

    Example:
        >>> send(torch.ones(2), torch.device("cpu")).tolist()
        [1.0, 1.0]
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Arriving:
    """A tensor on its way from its device to the CPU; nobody waits until it is needed.

    Args:
        tensor: float32, of any shape.

    Example:
        >>> Arriving(torch.ones(2)).numpy().tolist()
        [1.0, 1.0]
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.cpu()

    def numpy(self) -> NDArray[np.float32]:
        """It, when it is there."""
        if self._event is not None:
            self._event.synchronize()
        values: NDArray[np.float32] = self._host.numpy()
        return values
