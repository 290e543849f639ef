"""What `auto` stands for on this machine: precision, memory format, the precision of float32 products."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Forward FLOPs of one sample from which bf16 pays on a CPU that has it; below, casting costs more than it saves.
# Time against float32, one thread of an AMD EPYC with avx512_bf16: LeNet (0.8 M) 1.03, a net of two convolutions and a
# wide linear layer (58 M) 1.11, ViT-tiny (0.7 G) 0.47, ResNet-18 at 32x32 (1.1 G) 0.60, WRN-28-10 (10 G) 0.51.
MIN_FLOPS = 2e8

KEYS = ("precision", "channels_last", "float32_matmul_precision")


def placeholders(config: DictConfig) -> list[str]:
    """Puts plain values, which any net takes, where a root key stands at auto; returns those keys for `resolve`."""
    values = {"precision": "32", "channels_last": False, "float32_matmul_precision": "highest", "mode": "max"}
    open_keys = [key for key in values if config.get(key) == "auto"]
    config.update({key: values[key] for key in open_keys})
    return open_keys


def reopen(config: DictConfig) -> None:
    """Lets what refers to a key at auto refer to it again, in a config that was written before that was chosen."""
    for key in KEYS:
        for group in ("trainer", "model"):
            if config.get(key) == config[group].get(key) == "auto":
                config[group][key] = f"${{{key}}}"


def resolve(config: DictConfig, open_keys: list[str], build: Callable[[DictConfig, str], Any]) -> None:
    """Chooses for the keys, in place, as a careful person would; the config has passed its check.

    On CUDA with bf16: bf16-mixed, channels_last for convolutional nets, TF32. On a CPU with bf16 instructions:
    bf16-mixed for nets that are large enough, with channels_last. Elsewhere float32, contiguous. `build`: config.build.
    """
    if not open_keys:
        return
    import torch

    place = _place(config)
    if place == "cuda" and "float32_matmul_precision" in open_keys:
        config.float32_matmul_precision = "high"
    of_the_net = {"precision", "channels_last"} & set(open_keys)
    if not of_the_net or not (place == "cuda" or (place == "cpu" and cpu_has_bf16())):
        return
    convolutions, flops = weigh(config, build)
    pays = torch.cuda.is_bf16_supported(including_emulation=False) if place == "cuda" else flops >= MIN_FLOPS
    if "precision" in of_the_net and pays:
        config.precision = "bf16-mixed"
    if "channels_last" in of_the_net:
        config.channels_last = convolutions and str(config.precision) in ("bf16-mixed", "16-mixed", "bf16-true")


def _place(config: DictConfig) -> str | None:
    """Where a config trains, "cuda" or "cpu"; None on others."""
    import torch

    wanted = config.trainer.get("accelerator", "auto")
    if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    return "cpu" if wanted == "cpu" or (wanted == "auto" and not torch.backends.mps.is_available()) else None


def cpu_has_bf16() -> bool:
    import torch

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def weigh(config: DictConfig, build: Callable[[DictConfig, str], Any]) -> tuple[bool, int]:
    """Whether the net has 2-d convolutions, and its forward FLOPs of one sample, 0 where they are surely few.

    The net is built without storage; one that cannot be is taken for a small one.
    """
    import torch
    from torch import nn

    shape: Any = OmegaConf.select(config, "data.input_shape")
    if not shape or len(shape) != 3:
        return False, 0
    try:
        with torch.device("meta"):
            net = build(config, "model.net")
    except Exception:  # the building that counts comes later and says what is wrong
        return False, 0
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    # Each weight of a convolution meets at most every pixel, others meet the sample a few times: counting takes longer.
    pixels = shape[1] * shape[2]
    most = 2 * sum(m.weight.numel() * pixels for m in convolutions)
    attention = any(isinstance(m, nn.MultiheadAttention | nn.LayerNorm) for m in net.modules())
    most += 2 * sum(p.numel() for p in net.parameters()) * (pixels if attention else 1)
    if most < MIN_FLOPS:
        return bool(convolutions), 0
    from boltlab.callbacks.summary import summarize

    return bool(convolutions), summarize(net, tuple(shape))[0].flops or 0
