"""Whether the W&B server takes runs now."""

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
