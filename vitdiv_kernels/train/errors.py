"""What ends a command with one sentence for its user."""


class TrainError(RuntimeError):
    """Training can't start or go on; the message is one sentence for the user.

    `told_by_main`: all processes of the run raise it, and only the first one needs to tell.
    """

    def __init__(self, message: str, *, told_by_main: bool = False) -> None:
        super().__init__(message)
        self.told_by_main = told_by_main


class DataError(TrainError, ValueError):
    """Something is wrong with the data that the user named; the message is one sentence for the user."""
