"""Functions in processes of their own, which know each other or are killed, and can't hang."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from pathlib import Path

import torch

SECONDS = 120
PRELOADED = [
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "pytest"),
    *("sklearn.datasets", "sklearn.model_selection", "vitdiv_kernels.train.cli"),
]


def context():
    """Processes that start at once: a server has imported torch and the trainer, and has one thread."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


def _run(function, arguments, rank, size, port, answer):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - 10)  # where a process waits that hangs
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        result = function(*arguments)
    except BaseException:
        result = traceback.format_exc()
    part = Path(answer).with_suffix(".part")
    part.write_bytes(pickle.dumps(result))
    part.replace(answer)


def together(size, function, *arguments):
    """What the function returns in each of `size` processes that torch.distributed can connect; no text.

    All are killed where one takes longer than SECONDS.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, f"{rank}.pickle") for rank in range(size)]
        running = [
            context().Process(target=_run, args=(function, arguments, rank, size, port, str(answers[rank])))
            for rank in range(size)
        ]
        deadline = time.monotonic() + SECONDS
        for process in running:
            process.start()
        try:
            for process in running:
                process.join(max(0, deadline - time.monotonic()))
        finally:
            for process in running:
                process.kill()
                process.join()
        missing = [rank for rank, answer in enumerate(answers) if not answer.exists()]
        results = [pickle.loads(answer.read_bytes()) for answer in answers if answer.exists()]
        failed = [result for result in results if isinstance(result, str)]
        assert not failed, "\n".join(failed)
        assert not missing, f"the processes {missing} did not end in {SECONDS} seconds"
        return results
