"""`boltlab <verb> --cfg job` and Hydra's other flags: what prints a config and starts nothing."""

import importlib

from omegaconf import OmegaConf

from boltlab.config.compose import compose
from boltlab.ground.errors import ConfigError, Mistake

FLAGS = ("--cfg", "--info", "--resolve", "--package", "--hydra-help")
_TAKES_A_WORD = ("--cfg", "-c", "--info", "-i", "--package", "-p")
_SHORT = {"-c": "--cfg", "-i": "--info", "-p": "--package", "-m": "--multirun"}


def read(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The flags, each with the word that it takes, and the overrides."""
    flags, overrides, words = {}, [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        else:
            takes = flag in _TAKES_A_WORD and not equals
            flags[_SHORT.get(flag, flag)] = next(words, "") if takes else value
    return flags, overrides


def main(verb: str, arguments: list[str]) -> bool:
    """Prints the config where `--cfg job` asks for it; the rest is left to Hydra, whose overrides are checked here.

    Returns:
        Whether that was all.

    Raises:
        ConfigError: the same mistakes of keys and choices as without the flag.
    """
    flags, overrides = read(arguments)
    several = flags.pop("--multirun", None) is not None
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise ConfigError([Mistake(unknown[0], "is no option; overrides are key=value")])
    if several and verb != "train":
        raise ConfigError([Mistake("-m", "runs several trainings; only boltlab train takes it")])
    # What trains several times has a first job, and says how many there are.
    first = getattr(importlib.import_module(f"boltlab.commands.{'grid' if several else verb}"), "first", None)
    config, said = first(overrides) if first else (compose(verb, overrides, check=False).config, "")
    if flags.get("--cfg") != "job":
        if several:
            raise ConfigError([Mistake("-m", f"prints with --cfg job only, and not with {' '.join(flags)}")])
        return False
    package = flags.get("--package", "")
    part = OmegaConf.select(config, package) if package else config
    if part is None:
        raise ConfigError([Mistake(f"--package {package}", "is no part of the config")])
    for line in filter(None, (said, package and f"@package {package}")):
        print(f"# {line}")
    print(OmegaConf.to_yaml(part, resolve="--resolve" in flags) if OmegaConf.is_config(part) else part, end="")
    return True
