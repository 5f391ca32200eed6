"""Runs a function on several gloo ranks of this machine, forked in 0.1 s."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longtake.train.deepspeed_engine import import_deepspeed
from longtake.train.ranks import init_distributed, shutdown


def import_before_fork() -> None:
    """Does the slow imports here once (4 s) rather than in every forked rank."""
    import_deepspeed("cpu")
    importlib.import_module("deepspeed.runtime.zero.stage3")
    importlib.import_module("torch._inductor.compile_fx")  # DeepSpeed asks for it
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight], fused=True).step()  # imports dynamo and sympy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(
    rank: int, world_size: int, port: int, out: str, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        ranks = init_distributed("cpu", timeout=200)
        result = function(ranks, *args)
        Path(out, f"{rank}.json").write_text(json.dumps(result))
        shutdown(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0
) -> list[Any]:
    """`function(ranks: Ranks, *args)` on every rank; their JSON results in rank order.

    Fails when a rank fails or the time is up; no process outlives the call.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as out:
        port = free_port()
        processes = [
            context.Process(target=run_rank, args=(rank, world_size, port, out, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        assert codes == [0] * world_size, f"exit codes {codes} (None: killed after {timeout} s)"
        return [json.loads(Path(out, f"{r}.json").read_text()) for r in range(world_size)]
