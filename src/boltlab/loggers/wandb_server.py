"""Whether the W&B server takes runs now."""

import os
import re

from boltlab.loggers.place import no_answer


def refusal(timeout_seconds: float) -> str | None:
    """What keeps W&B from taking runs now: no API key, or a server that does not take it; None: nothing."""
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            return "no API key; `wandb login` saves one"
    except wandb.Error as error:  # a key of the wrong form
        return str(error)
    settings = wandb.setup().settings
    auth = ("api", settings.api_key) if settings.api_key else None
    query = {"query": "query { viewer { id } }"}
    problem = no_answer("POST", f"{settings.base_url}/graphql", timeout_seconds, json=query, auth=auth)
    return problem and f"{settings.base_url} {problem}"


# What pydantic says around the reason.
_AROUND = re.compile(r"^\d+ validation errors? for Settings|\[type=.*?\]|For further information.*")


def set_aside(error: Exception) -> str:
    """Sets aside what wandb does not take of the environment and of ~/.netrc; returns why it does not take it."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY"):
        os.environ.pop(name, None)
    os.environ["NETRC"] = os.devnull
    wandb.teardown()
    return " ".join(_AROUND.sub("", str(error)).split())[:200] or type(error).__name__
