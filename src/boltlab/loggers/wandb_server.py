"""Whether the W&B server takes runs now."""

import threading


def refusal(timeout_seconds: float) -> str | None:
    """What keeps W&B from taking runs now: no API key, or a server that does not take it; None: nothing."""
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            return "no API key; `wandb login` saves one"
    except wandb.Error as error:  # a key of the wrong form
        return str(error)
    settings = wandb.setup().settings
    return _ask_server(settings.base_url, settings.api_key, timeout_seconds)


def _ask_server(base_url: str, api_key: str | None, timeout_seconds: float) -> str | None:
    """What keeps the W&B server from taking the key, or None. wandb's own check retries a refused connection until
    its timeout is over; this one returns at once."""
    import requests  # comes with wandb

    problems = [f"{base_url} does not answer within {timeout_seconds:.0f} s"]

    def ask() -> None:
        try:
            answer = requests.post(
                f"{base_url}/graphql",
                json={"query": "query { viewer { id } }"},
                auth=("api", api_key) if api_key else None,
                timeout=timeout_seconds,
            )
        except requests.Timeout:
            return
        except requests.RequestException as error:
            problems[0] = f"{base_url} cannot be reached: {type(error).__name__}"
            return
        if answer.status_code in (401, 403):
            problems[0] = f"{base_url} refuses the API key"
        elif not answer.ok:
            problems[0] = f"{base_url} answers with HTTP status {answer.status_code}"
        else:
            problems.clear()

    # In a thread, because looking up a name and a slow stream of bytes know no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return problems[0] if problems else None
