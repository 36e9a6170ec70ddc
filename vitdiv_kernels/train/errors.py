"""What ends a command with one sentence for its user."""


class TrainError(RuntimeError):
    """Training can't start or go on; the message is one sentence for the user."""


class DataError(TrainError, ValueError):
    """Something is wrong with the data that the user named; the message is one sentence for the user."""
