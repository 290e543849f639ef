"""Errors that are the user's to mend: printed as they stand, without a traceback."""


class UserError(Exception):
    """Something outside the code is wrong; the message says what and how to mend it. The command exits with 1."""


class DataError(UserError):
    """A data set is missing, unreadable or not what the config says; the message names the file, folder or class."""


class NonFiniteLoss(UserError):
    """A loss, a gradient, the weights or the monitored metric became NaN or infinite; the message says which, where."""


class WorkerError(UserError):
    """A process that reads data has died, hangs, or cannot send its batches; started again it may well go on."""
