"""What trackers share: by what they group runs, and whether their server is there."""

import threading
from pathlib import Path
from typing import Any


def place(folder: Path) -> tuple[str | None, str | None]:
    """The name of the sweep that a run is a job of, and whether the run is of "train", "eval" or, of a sweep, "trial".

    Read from where the folder stands; (None, None) elsewhere.
    """
    parent = folder.resolve().parent
    if parent.name in ("train", "eval"):
        return None, parent.name
    return (parent.name, "trial") if parent.parent.name == "train" else (None, None)


def no_answer(method: str, url: str, timeout_seconds: float, **arguments: Any) -> str | None:
    """What keeps a server from being used, or None. The trackers' own clients try a refused connection for minutes.

    arguments: of `requests.request`; a server that refuses its `auth` refuses the API key.
    """
    import requests  # comes with wandb and mlflow

    problems = [f"does not answer within {timeout_seconds:.0f} s"]

    def ask() -> None:
        try:
            answer = requests.request(method, url, timeout=timeout_seconds, **arguments)
        except requests.Timeout:
            return
        except requests.RequestException as error:
            problems[0] = f"cannot be reached: {type(error).__name__}"
            return
        if answer.ok:
            problems.clear()
        else:
            refused = "auth" in arguments and answer.status_code in (401, 403)
            problems[0] = "refuses the API key" if refused else f"answers with HTTP status {answer.status_code}"

    # In a thread, because looking up a name and a slow stream of bytes know no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return problems[0] if problems else None
