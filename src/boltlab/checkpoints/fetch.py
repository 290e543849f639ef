"""Downloading a checkpoint."""

import hashlib
import re
import secrets
import time
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from boltlab.checkpoints.file import CheckpointError, megabytes, whole

A_DAY = 24 * 3600


def fetch(url: str, folder: Path, timeout_seconds: float = 30.0) -> Path:
    """Downloads a checkpoint into `folder`, whole or not at all; it is as little trusted there as any other file.

    Its name there ends with the SHA-256 of its content: addresses that end alike, and a file that the server has
    exchanged, never replace what a run began with.

    Raises:
        CheckpointError: no http address, no answer, or an answer that ends early; the message names the address.
    """
    if not url.startswith(("http://", "https://")):
        raise CheckpointError(f"{url} is no http or https address")
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:
            last = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
            name = re.sub(r"[^\w.=-]+", "_", last).strip(".").removesuffix(".ckpt")[:100]
            beside = folder / f".{name[:50]}.{secrets.token_hex(4)}"
            expected = answer.headers.get("Content-Length")
            print(f"{url}  {megabytes(int(expected)) if expected else 'of unknown size'}", flush=True)
            for left in folder.glob(".*"):  # of a download that was killed
                if time.time() - left.stat().st_mtime > A_DAY:
                    left.unlink()
            hashed = hashlib.sha256()
            with whole(beside) as file:
                while part := answer.read(1 << 20):
                    hashed.update(part)
                    file.write(part)
                if expected and file.tell() != int(expected):
                    raise HTTPException(f"ended after {megabytes(file.tell())}")
            return beside.replace(folder / f"{name}-{hashed.hexdigest()[:16]}.ckpt")
    except (OSError, ValueError, HTTPException, CheckpointError) as e:
        raise CheckpointError(f"cannot fetch {url}: {getattr(e, 'reason', None) or e or type(e).__name__}") from e
