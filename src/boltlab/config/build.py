"""Building the objects that a config describes: the only caller of `hydra.utils.instantiate`."""

import re
from typing import Any

from omegaconf import OmegaConf

from boltlab.ground.errors import ConfigError, Mistake, UserError


def build(config: Any, key: str, **objects: Any) -> Any:
    """Builds the object that the node at `key` describes; `objects` are passed as they are.

    Raises:
        ConfigError: a class refused its arguments; the message names the node.
        UserError: raised by the class itself, passed on as it is.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    node = OmegaConf.select(config, key) if OmegaConf.is_config(config) else config[key]
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        return instantiate({"_convert_": "all", **plain}, **objects)
    except InstantiationException as e:
        cause = e.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError) or type(cause).__name__ == "MisconfigurationException":
            inner = re.search(r"full_key: (\S+)", str(e))
            where = f"{key}.{inner[1]}" if inner else key
            raise ConfigError([Mistake(where, " ".join(str(cause).split()))]) from cause
        raise
