"""Messages between processes, for one process and for two."""

import socket
import subprocess
import sys

import pytest

from switchjax.config import UserError
from switchjax.parallel.processes import all_values, first_then_others


def test_one_process_agrees_with_itself() -> None:
    assert all_values("alone") == ["alone"]
    assert first_then_others(lambda: 3) == 3
    with pytest.raises(UserError, match="no room"):
        first_then_others(lambda: fail("no room"))


def fail(message: str) -> None:
    raise UserError(message)


TWO = """
import sys
from switchjax.config import UserError
from switchjax.parallel.joining import joined_processes
from switchjax.parallel.processes import all_values, first_then_others, process_count, process_index

index, address = int(sys.argv[1]), sys.argv[2]

def refuse():
    raise UserError(f"no room in process {process_index()}")

with joined_processes(address, 2, index, 100):
    print(process_index(), process_count(), all_values(f"value {index}"), all_values("again"))
    print(first_then_others(process_index))
    try:
        first_then_others(refuse)
    except UserError as error:
        print(error)
"""


def test_two_processes_know_each_others_values_and_are_refused_together() -> None:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        address = f"localhost:{opened.getsockname()[1]}"
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO, str(index), address], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    for index, process in enumerate(processes):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert output.splitlines() == [
            f"{index} 2 ['value 0', 'value 1'] ['again', 'again']",
            str(index),
            "no room in process 0",
        ]
