"""FLOP/s that a device reaches."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch


def peak_flops(device: Any, precision: str) -> float:
    """FLOP/s of a large matrix product or convolution, whichever is faster, in the number format of `precision`.

    Both, because one can be far from what the machine does: on AMD processors MKL's product makes a third of oneDNN's
    convolution.
    """
    bits, _, _ = precision.partition("-")
    dtype = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(bits, torch.float32)
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    size, images = (1024, 8) if device.type == "cpu" else (8192, 1024)

    def convolution() -> float:
        layout: Any = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
        x, weight = torch.randn(images, 256, 16, 16).to(**layout), torch.randn(256, 256, 3, 3).to(**layout)
        seconds, _ = _shortest(device, lambda: torch.conv2d(x, weight, padding=1))
        return 2 * images * 16 * 16 * 256 * 256 * 9 / seconds

    fastest = 0.0
    for flops in (lambda: 1e12 * matmul(device, dtype, size, tf32)[0], convolution):
        with contextlib.suppress(RuntimeError), torch.no_grad():  # no such product on this device
            fastest = max(fastest, flops())
    return fastest


def matmul(device: Any, dtype: Any, size: int, tf32: bool) -> tuple[float, float]:
    """TFLOP/s (best of three) and relative error of a [size, size] matrix product."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device)
    truth = a[:8].cpu().double() @ a.cpu().double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        x = a.to(dtype)
        seconds, product = _shortest(device, lambda: x @ x)
    finally:
        torch.set_float32_matmul_precision(before)
    error = (product[:8].cpu().double() - truth).norm() / truth.norm()
    return 2 * size**3 / seconds / 1e12, float(error)


def synchronize(device: Any) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _shortest(device: Any, compute: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a computation takes, the best of three, and what it gives."""
    seconds = []
    for _ in range(4):  # the first one loads kernels
        synchronize(device)
        start = time.perf_counter()
        found = compute()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), found
