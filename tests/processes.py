"""Start processes from a server that has imported torch, so that only the first start in a session waits for that.

They inherit the environment of the session's first call. They are new processes: no thread, no kernel and no CUDA
context of the session is in them.
"""

import multiprocessing

import torch


def context() -> multiprocessing.context.BaseContext:
    multiprocessing.set_forkserver_preload(["torch"])
    return multiprocessing.get_context("forkserver")


def run_ranks(function, *arguments, ranks: int) -> None:
    """Run ``function(rank, *arguments)`` in a process for each rank; raise the first error of one."""
    context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")
