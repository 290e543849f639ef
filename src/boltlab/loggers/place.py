"""Which sweep and kind a run is of, by the place of its folder: what trackers group runs by."""

from pathlib import Path


def place(folder: Path) -> tuple[str | None, str | None]:
    """The name of the sweep that a run is a job of, and whether the run is of "train", "eval" or, of a sweep, "trial".

    Read from where the folder stands; (None, None) elsewhere.
    """
    parent = folder.resolve().parent
    if parent.name in ("train", "eval"):
        return None, parent.name
    return (parent.name, "trial") if parent.parent.name == "train" else (None, None)
