"""Any classification net of torchvision, with input channels and classes filled in."""

import difflib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models
from boltlab import UserError
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] at another size; bilinear, with antialiasing where they shrink."""
    if x.shape[-2:] == size:
        return x
    shrinks = x.shape[-2] > size[0] or x.shape[-1] > size[1]
    return F.interpolate(x, size, mode="bilinear", antialias=shrinks)


def unknown_name(name: str, names: list[str], library: str) -> str:
    """What to say of a name that a library does not have."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    suggestion = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"{library} has no classification net {name!r}{suggestion}"


def spread(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight for other channels; equal ones get the answer that a gray picture had."""
    return (weight.sum(dim=1, keepdim=True) / channels).repeat(1, channels, 1, 1)


class TorchvisionNet(nn.Module):
    """A net by its name in torchvision.models, e.g. "vgg11": [B, C, H, W] → [B, num_outputs].

    - Channels: the first convolution is replaced where they are not three.
    - Size: images below the net's smallest are enlarged to it (vgg 32, densenet 29, alexnet 63, inception_v3 75);
      the transformers that know one size only (vit, maxvit: 224) and swin below 224 get that size.
    - googlenet and inception_v3 come without their auxiliary outputs.
    - `pretrained`: ImageNet weights, fetched when a new training begins. The head starts afresh if the number of
      classes is not 1000; a replaced first convolution gets the sum of the colour weights, shared by its channels. A
      line says where the data are not normalized and resized as those of the weights.

    Most of these nets use one ReLU module several times and in place. Where that is in the way (Opacus, quantizers),
    take `model=resnet18` and its like.

    Raises:
        ValueError: torchvision has no such net.
    """

    def __init__(
        self, name: str, input_shape: tuple[int, int, int], num_outputs: int, pretrained: bool = False
    ) -> None:
        super().__init__()
        for _, message in self.check_arguments({"name": name}):
            raise ValueError(message)
        self.name = name
        self.pretrained = pretrained
        arguments: dict[str, Any] = {"num_classes": num_outputs}
        if name in ("googlenet", "inception_v3"):
            # Their weights were trained on inputs in -1…1, to which transform_input brings ImageNet's normalization.
            transform = pretrained and input_shape[0] == 3
            arguments |= {"aux_logits": False, "init_weights": True, "transform_input": transform}
        weights = torchvision.models.get_model_weights(name).DEFAULT
        smallest = weights.meta["min_size"] if pretrained or name != "vit_h_14" else (224, 224)
        if name.startswith("vit_"):
            arguments["image_size"] = smallest[0]
        self.net = torchvision.models.get_model(name, **arguments)
        channels, height, width = input_shape
        self.size: tuple[int, int] | None = None
        if name.startswith(("vit_", "maxvit_")):
            self.size = (smallest[0], smallest[1])
        elif height < smallest[0] or width < smallest[1]:
            self.size = (max(height, smallest[0]), max(width, smallest[1]))
        self.first, convolution = next((n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d))
        if channels != 3:
            convolution.in_channels = channels
            convolution.weight = nn.Parameter(spread(convolution.weight.detach(), channels))

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        """A name that torchvision does not have."""
        name, names = arguments.get("name"), torchvision.models.list_models(module=torchvision.models)
        if isinstance(name, str) and name not in names:
            return [("name", unknown_name(name, names, "torchvision"))]
        return []

    def load_pretrained(self) -> dict[str, Any]:
        """Puts torchvision's best ImageNet weights into the net, if it is `pretrained`.

        Returns:
            mean, std and interpolation of the images that they were trained on.

        Raises:
            UserError: they are neither on this machine nor to be had.
        """
        if not self.pretrained:
            return {}
        weights = torchvision.models.get_model_weights(self.name).DEFAULT
        try:
            source = torchvision.models.get_model(self.name, weights=weights).state_dict()
        except (OSError, RuntimeError) as e:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise UserError(
                f"the weights of {self.name} cannot be fetched from {weights.url} ({e}).\n"
                f"Put that file at {file}, or train from scratch with model.net.pretrained=false."
            ) from e
        own = self.net.state_dict()
        key = f"{self.first}.weight"
        if own[key].shape != source[key].shape:
            source[key] = spread(source[key], own[key].shape[1])
        # Only the head can have another shape: it keeps its random start.
        self.net.load_state_dict({k: source[k] if source[k].shape == v.shape else v for k, v in own.items()})
        images = weights.transforms()
        return {"mean": images.mean, "std": images.std, "interpolation": images.interpolation.value}

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x if self.size is None else resize(x, self.size))
        return output
