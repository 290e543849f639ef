"""Any net of timm, with input channels and classes filled in; needs the extra `timm`."""

import copy
from typing import Any

import torch
from boltlab import UserError
from torch import Tensor, nn

from project.models.torchvision_net import resize, unknown_name

try:
    import timm
except ImportError:
    timm = None

MISSING = "the package timm is not installed: pip install 'boltlab[timm]'"


class TimmNet(nn.Module):
    """A net by its name in timm, e.g. "convnext_tiny" or "resnet18.a1_in1k": [B, C, H, W] → [B, num_outputs].

    Nets that know one size only (most transformers) get the images resized to it. `pretrained`: timm's weights,
    fetched when a new training begins; timm adapts the first layer and the head. `drop_rate` and `drop_path_rate` are
    passed on where the net has them.

    Raises:
        UserError: timm is not installed.
        ValueError: timm has no such net, or the net cannot take images of this size.
    """

    def __init__(
        self,
        model_name: str,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        pretrained: bool = False,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__()
        if timm is None:
            raise UserError(MISSING)
        for _, message in self.check_arguments({"model_name": model_name}):
            raise ValueError(message)
        self.model_name = model_name
        self.pretrained = pretrained
        self.arguments: dict[str, Any] = {"in_chans": input_shape[0], "num_classes": num_outputs}
        self.arguments |= {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        self.net: nn.Module = timm.create_model(model_name, pretrained=False, **self.arguments)
        config = getattr(self.net, "pretrained_cfg", {})
        self.size = tuple(config["input_size"][1:]) if config.get("fixed_input_size") else None
        self._check_size(input_shape)

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        """timm is missing, or the name is not one of its nets."""
        if timm is None:
            return [("model_name", MISSING)]
        name = arguments.get("model_name")
        if isinstance(name, str) and not timm.is_model(name.split(".")[0]):
            return [("model_name", unknown_name(name, timm.list_models(), "timm"))]
        return []

    def _check_size(self, input_shape: tuple[int, int, int]) -> None:
        # On the meta device, where nothing is computed: a net that is too deep for small images says so now.
        height, width = self.size or input_shape[1:]
        try:
            net = copy.deepcopy(self.net).to("meta").eval()
            net(torch.empty(1, input_shape[0], height, width, device="meta"))
        except NotImplementedError:
            pass  # an operation that the meta device does not know: the first batch will tell
        except (RuntimeError, AssertionError, ValueError) as e:
            raise ValueError(f"{self.model_name} cannot take images of {height}×{width} pixels: {e}") from e

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm keeps from decaying: positions and tokens."""
        names = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else ()  # type: ignore[operator]
        return {f"net.{name}" for name in names}

    def load_pretrained(self) -> dict[str, Any]:
        """Puts timm's weights into the net, if it is `pretrained`.

        Returns:
            mean, std and interpolation of the images that they were trained on, as far as timm knows.

        Raises:
            UserError: they are neither on this machine nor to be had.
        """
        if not self.pretrained:
            return {}
        try:
            source = timm.create_model(self.model_name, pretrained=True, **self.arguments)
        except Exception as e:  # timm, huggingface_hub, httpx and the file system each have errors of their own
            raise UserError(
                f"the weights of {self.model_name} cannot be fetched ({type(e).__name__}: {str(e).splitlines()[0]}).\n"
                "Fetch them where there is a network (HF_HOME names the folder to copy), "
                "or train from scratch with model.net.pretrained=false."
            ) from e
        self.net.load_state_dict(source.state_dict())
        known = getattr(source, "pretrained_cfg", None) or getattr(source, "default_cfg", None) or {}
        return {name: known[name] for name in ("mean", "std", "interpolation") if known.get(name)}

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x if self.size is None else resize(x, self.size))
        return output
