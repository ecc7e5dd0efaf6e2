"""Processes of one launch, as ``accelerate launch`` starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start_two(arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes of Python that know of each other, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """What two processes say, that must both succeed."""
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    return output
