"""Runs a Python program on a small file system of its own, which no other process sees.

    small_disk.py DISK KILOBYTES COPY -m MODULE ARGUMENTS...
    small_disk.py DISK KILOBYTES COPY -c CODE

mounts one of that size at the folder DISK, and leaves in the folder COPY what the program has left on it. Ends as the
program does, or with FORBIDDEN where this machine lets nobody mount a file system.
"""

import ctypes
import os
import runpy
import shutil
import sys
from pathlib import Path

FORBIDDEN = 99
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
ALL_BELOW, PRIVATE = 1 << 14, 1 << 18  # MS_REC, MS_PRIVATE


def call(name: str, *arguments: object) -> None:
    """A function of the C library, whose failure is an `OSError`."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(disk: str, kilobytes: int) -> None:
    """Mounts it for this process and those that it starts; who is not root is root inside."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_MOUNTS | (NEW_USER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call("mount", b"none", b"/", None, ALL_BELOW | PRIVATE, None)
    call("mount", b"tmpfs", os.fsencode(disk), b"tmpfs", 0, f"size={kilobytes}k".encode())


def main() -> None:
    disk, kilobytes, copy, kind, what, *rest = sys.argv[1:]
    try:
        mount(disk, int(kilobytes))
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(FORBIDDEN)
    program = os.fork()
    if program:
        _, status = os.waitpid(program, 0)
        shutil.copytree(disk, copy, symlinks=True, dirs_exist_ok=True)
        sys.exit(os.waitstatus_to_exitcode(status))
    sys.argv[:] = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
