"""Downloading a checkpoint."""

import re
import shutil
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from boltlab.checkpoints.file import CheckpointError, megabytes, whole


def fetch(url: str, folder: Path, timeout_seconds: float = 30.0) -> Path:
    """Downloads a checkpoint into `folder`, whole or not at all; it is as little trusted there as any other file.

    Raises:
        CheckpointError: no http address, no answer, or an answer that ends early; the message names the address.
    """
    if not url.startswith(("http://", "https://")):
        raise CheckpointError(f"{url} is no http or https address")
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:
            last = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
            path = folder / (re.sub(r"[^\w.=-]+", "_", last).strip(".").removesuffix(".ckpt") + ".ckpt")
            expected = answer.headers.get("Content-Length")
            print(f"{url}  {megabytes(int(expected)) if expected else 'of unknown size'}", flush=True)
            with whole(path) as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                if expected and file.tell() != int(expected):
                    raise HTTPException(f"ended after {megabytes(file.tell())}")
    except (OSError, ValueError, HTTPException, CheckpointError) as e:
        raise CheckpointError(f"cannot fetch {url}: {getattr(e, 'reason', None) or e or type(e).__name__}") from e
    return path
