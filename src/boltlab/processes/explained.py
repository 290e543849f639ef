"""What is printed of errors of torch and Lightning that a config or a module can mend."""

import errno
import re

from boltlab.ground.errors import UserError

_STATIC = "not compatible with static_graph set to True"
_OF_DDP = ("Expected to have finished reduction in the prior iteration", "not used in producing the loss", _STATIC)


def explained(error: BaseException) -> str | None:
    """The message of an error; None where its traceback says more."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, ValueError) and text.startswith("Expected more than 1 value per channel when training"):
        return (
            f"a batch norm got a batch of 1 sample in training ({text.rpartition('got ')[2]}), and one value has no"
            " deviation: another data.batch_size, so that no batch or share of a process is left with one; or"
            " drop_last=True in a DataLoader of your own"
        )
    if not isinstance(error, RuntimeError) and type(error).__name__ != "MisconfigurationException":
        return None
    if any(words in text for words in _OF_DDP):
        return _of_ddp(text)
    # What Lightning says of a module, data module or callbacks that lack a step, a loader, a metric to monitor.
    lightning = type(error).__name__ == "MisconfigurationException" or text.startswith("Early stopping conditioned on")
    return " ".join(text.split()) if lightning else None


def _of_ddp(text: str) -> str:
    if _STATIC in text:
        return "steps of this module use other parameters than its first one: trainer.strategy.static_graph=false"
    found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
    which = f" (numbers {', '.join(found[1].split())} of its parameters())" if found else ""
    return (
        f"a backward pass gave some parameters of this module no gradient{which}, as where it optimizes manually or"
        " leaves a part out. DDP waits for one of each: trainer=ddp trainer.strategy.find_unused_parameters=true looks"
        " for those without"
    )
