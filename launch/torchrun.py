"""Training on several processes: torchrun's command line, its signals, and an honest exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from longtake.train.interfaces import BIND_ADDRESS, interface_address

EXIT_FINISHED, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 75
EXIT_LOST = 76  # of `longtake.launch.agent`: the rendezvous is lost
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Time for the last checkpoint after SIGTERM; torchrun's own default of 30 s kills in the middle.
SHUTDOWN_SECONDS = 300


@dataclass(frozen=True)
class Launch:
    """Where the ranks of one run live."""

    num_processes: int  # on this node
    num_nodes: int = 1
    node_rank: int = 0
    rendezvous: str = ""  # host:port of node 0, with num_nodes > 1
    run_id: str = "longtake"  # the same on every node
    max_restarts: int = 0  # of all ranks, when one was killed or has failed
    interface: str = ""  # that all of them talk through; empty: what torch chooses

    def __post_init__(self) -> None:
        if self.num_nodes > 1 and ":" not in self.rendezvous:
            raise ValueError(
                f"--nnodes {self.num_nodes} needs --rendezvous HOST:PORT of the first node, "
                f"got {self.rendezvous!r}"
            )
        if not 0 <= self.node_rank < self.num_nodes:
            raise ValueError(
                f"--node-rank {self.node_rank} must be 0..{self.num_nodes - 1} "
                f"for --nnodes {self.num_nodes}"
            )
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts {self.max_restarts} must be >= 0")
        if self.interface:
            self._check_interface(interface_address(self.interface))

    def _check_interface(self, address: str) -> None:
        host = self.rendezvous.rpartition(":")[0]
        if self.num_nodes > 1 and self.node_rank == 0 and socket.gethostbyname(host) != address:
            raise ValueError(
                f"--rendezvous {self.rendezvous} must name this first node by the address of "
                f"--interface {self.interface}, {address}"
            )


def torchrun_argv(launch: Launch, overrides: Sequence[str]) -> list[str]:
    """The command line that starts `longtake.train` on this node's processes."""
    where = ["--standalone"]
    if launch.num_nodes > 1 or launch.interface:
        is_host = launch.node_rank == 0  # told, since torchrun guesses it from host names
        where = [
            f"--nnodes={launch.num_nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.rendezvous or _own_endpoint(launch)}",
            f"--rdzv-id={launch.run_id}",
            f"--rdzv-conf=is_host={int(is_host)}",
        ]
    if launch.interface:
        where.append(f"--local-addr={interface_address(launch.interface)}")
    return [
        *(sys.executable, "-m", "longtake.launch.agent", *where),
        f"--nproc-per-node={launch.num_processes}",
        f"--max-restarts={launch.max_restarts}",
        "--signals-to-handle=" + ",".join(s.name for s in (*SIGNALS, signal.SIGQUIT)),
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        *("-m", "longtake.train", *overrides),
    ]


def _own_endpoint(launch: Launch) -> str:
    """Of a single node's rendezvous on the interface: a port that is free."""
    address = interface_address(launch.interface)
    with socket.create_server((address, 0)) as probe:
        return f"{address}:{probe.getsockname()[1]}"


def torchrun_environment(interface: str = "") -> dict[str, str]:
    """This environment, with the setting without which half of the restarts with gloo fail, and
    those that hold the traffic of all ranks to an interface."""
    bound = {}
    if interface:
        bound = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        bound[BIND_ADDRESS] = interface_address(interface)
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "LONGTAKE_LAUNCHED": str(time.time()),
        **bound,
    }


def run_torchrun(launch: Launch, overrides: Sequence[str], run_folder: Path) -> int:
    """Run to the end, passing signals on. Returns 0, 1 or 75 as the run folder's marker says.

    torchrun itself exits 1 whatever a worker returned, so a run that saved and left on a signal
    would look failed to a scheduler. Where the rendezvous was lost, the node takes part in a new
    one, as often as ranks may be restarted.
    """
    stale = preemption_stamp(run_folder)
    code = EXIT_LOST
    for _ in range(launch.max_restarts + 1):
        environment = torchrun_environment(launch.interface)
        code = _wait(torchrun_argv(launch, overrides), environment)
        if code != EXIT_LOST:
            break
    return exit_code(code, run_folder, stale)


def _wait(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end, passing signals on; its exit code."""
    with subprocess.Popen(command, env=environment) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def is_worker() -> bool:
    """Whether this process is one of torchrun's: such a one starts no others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_on_processes(num_processes: int, argv: Sequence[str]) -> int:
    """Run `longtake ARGV` on several processes of this machine; exit code 0 or 1.

    `--nproc` itself is left out: torchrun would take it for an option of its own.
    """
    kept, words = [], iter(argv)
    for word in words:
        if word == "--nproc":
            next(words)
        elif not word.startswith("--nproc="):
            kept.append(word)
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}")
    command = [sys.executable, *launch, "-m", "longtake.launch.cli", *kept]
    code = _wait(command, torchrun_environment())
    return EXIT_FINISHED if code == 0 else EXIT_FAILED


def exit_code(code: int, run_folder: Path, stale: int | None) -> int:
    """0, 75 or 1, from torchrun's code and the run's marker.

    `stale` is the `preemption_stamp` before the start: a marker that an earlier attempt left must
    not send a run that fails at its start round for ever.
    """
    if code == 0:
        return EXIT_FINISHED
    return EXIT_PREEMPTED if preemption_stamp(run_folder) not in (None, stale) else EXIT_FAILED


def preemption_stamp(run_folder: Path) -> int | None:
    """When the run folder was marked PREEMPTED (ns), None where it is not."""
    marker = run_folder / "PREEMPTED"
    return marker.stat().st_mtime_ns if marker.exists() else None
