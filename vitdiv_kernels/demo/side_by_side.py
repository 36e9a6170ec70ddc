"""Models that are trained side by side, each by a process with one thread."""

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from ..train.errors import TrainError
from ..train.logs import progress

OnStep = Callable[[int, dict[str, Any]], None]
Train = Callable[..., dict[str, Any]]  # train(name, steps, *arguments, on_step)


def _train_in_child(pipe: Connection, train: Train, name: str, steps: int, arguments: tuple) -> None:
    """Sends (step, cross-entropy) now and then, and at last the result or the error."""
    torch.set_num_threads(1)

    def tell(step: int, terms: dict[str, Any]) -> None:
        if step % 10 == 0 or step == steps:
            pipe.send((step, float(terms["cross_entropy"])))

    try:
        pipe.send(train(name, steps, *arguments, tell))
    except TrainError as error:
        pipe.send(error)
    except KeyboardInterrupt:  # the parent hears of it, too
        pass


def train_models(
    titles: Mapping[str, str], train: Train, steps: int, *arguments: Any
) -> dict[str, dict[str, Any]]:
    """What `train(name, steps, *arguments, on_step)`, a function of a module, returns for each name.

    Raises TrainError where a process does, or ends early.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, locked
    running, results, steps_of, shown = {}, {}, dict.fromkeys(titles, 0), {}
    try:
        for name in titles:
            pipe, its_end = context.Pipe(duplex=False)
            process = context.Process(
                target=_train_in_child, args=(its_end, train, name, steps, arguments), daemon=True
            )
            process.start()
            its_end.close()  # the child's death then ends the pipe
            running[pipe] = name, process
        with progress("cross-entropy", len(titles) * steps) as move:
            while running:
                for pipe in cast(list[Connection], wait(list(running))):
                    name, process = running[pipe]
                    try:
                        said = pipe.recv()
                    except EOFError:
                        process.join()
                        raise TrainError(
                            f"the process that trains the {titles[name]} ended with status {process.exitcode}"
                        ) from None
                    if isinstance(said, Exception):
                        raise said
                    if isinstance(said, dict):
                        results[name] = said
                        del running[pipe]
                        process.join()
                        continue
                    steps_of[name], shown[name] = said[0], f"{said[1]:.3f}"
                    move(sum(steps_of.values()), **shown)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return {name: results[name] for name in titles}
