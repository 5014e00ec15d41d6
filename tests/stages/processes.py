"""Processes that may be killed: one that has imported everything forks another for each run, as starting takes
seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.conftest import REPOSITORY

Run = Callable[..., int]  # exit status of a run with these arguments, negative where a signal ended it

_FORKING = """
import json, os, sys
import torch._dynamo  # which torch imports when something is learned

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        os.dup2(2, 1)
        sys.exit(run(*json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@contextmanager
def forking(source: str) -> Iterator[Run]:
    """Runs of the function ``run`` that ``source`` defines, each in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, "-c", source + _FORKING],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None

    def run(*arguments: object) -> int:
        print(json.dumps(arguments), file=server.stdin, flush=True)
        return int(server.stdout.readline())

    with server:
        yield run
        server.stdin.close()
