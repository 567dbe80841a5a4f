"""Saves whose process is killed while their files move."""

import os
from collections.abc import Callable


def kill_at_move(number: int, save: Callable[[], object]) -> bool:
    """Runs a save in a process of its own, which ends without any clean-up in place of a move; whether it came so far.

    Args:
        number: of the move, from 1.
        save: what moves files by `os.replace`.
    """
    process = os.fork()
    if process == 0:
        moves, replace = 0, os.replace

        def move(source: str, destination: str) -> None:
            nonlocal moves
            moves += 1
            if moves == number:
                os._exit(9)
            replace(source, destination)

        try:
            os.replace = move
            save()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, 9)
    return status == 9
