"""A progress bar where tqdm is installed, and nothing where it is not."""


class Progress:
    """`bar.to(step, **shown)` moves the bar; use it as a context manager."""

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(
                total=total, initial=start, desc=label, unit="step", dynamic_ncols=True, mininterval=0.5
            )

    def to(self, step: int, **shown: str) -> None:
        if self.bar is not None:
            if shown:
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
