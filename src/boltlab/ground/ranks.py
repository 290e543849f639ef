"""The variables by which processes of one run find one another, where torchrun has not set them."""

from collections.abc import Mapping

from boltlab.ground.errors import ConfigError, Mistake


def refuse_a_part(variables: Mapping[str, str]) -> None:
    """Refuses variables that would make this process wait for others in vain.

    Raises:
        ConfigError: some are missing, or are no numbers, or the rank is none of the processes.
    """
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    numbers = [variables.get(name, "") for name in names]
    if numbers[1] != "1":
        names += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in names if name not in variables]
    if missing or not all(map(str.isdigit, numbers)) or int(numbers[0]) >= int(numbers[1]):
        said = " ".join(f"{name}={variables[name]}" for name in names if name in variables)
        why = f"without {', '.join(missing)}" if missing else "RANK and LOCAL_RANK are numbers from 0 below WORLD_SIZE"
        raise ConfigError([Mistake(said, f"of the environment: {why}. torchrun sets all; unset RANK to run alone")])
