"""What compiled code shows without running: its main loop, the widths of its loads, its matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
LOADS = ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")
PRODUCTS = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "OMMA")
LOCAL = ("LDL", "STL")


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the program of this name, which comes with Triton, prints of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(triton.knobs.nvidia.cuobjdump.path), option, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> list[tuple[int, str, str]]:
    """Address, name and operands of each instruction, in order."""
    found = INSTRUCTION.findall(cuobjdump(cubin, "--dump-sass"))
    return [(int(address, 16), name, operands) for address, name, operands in found]


def loops(code: list[tuple[int, str, str]]) -> list[list[tuple[str, str]]]:
    """The instructions of each loop that holds no other loop."""
    places = {address: index for index, (address, _, _) in enumerate(code)}
    spans = []
    for index, (_, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and places.get(int(target.group(1), 16), index) < index:
            spans.append((places[int(target.group(1), 16)], index))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[(name, operands) for _, name, operands in code[first : last + 1]] for first, last in inner]


def _starts(name: str, kinds: tuple[str, ...]) -> bool:
    return name.split(".")[0] in kinds


def _bits(name: str) -> int:
    """The width of a load; 32 if it does not say."""
    for part in name.split("."):
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
        if part in ("64", "128", "256"):
            return int(part)
    return 32


def read_sass(cubin: bytes) -> dict[str, Any]:
    """Figures of the code for an NVIDIA GPU.

    The main loop is the longest that multiplies matrices, or the longest that loads, if none does; the whole code, if
    no loop loads. `load_bits` counts its loads from global memory by width, and `local_in_loop` accesses to local
    memory, where registers are spilled.
    """
    code = disassemble(cubin)
    bodies = loops(code)
    multiply = [body for body in bodies if any(_starts(name, PRODUCTS) for name, _ in body)]
    load = [body for body in bodies if any(_starts(name, LOADS) for name, _ in body)]
    whole = [(name, operands) for _, name, operands in code]
    main = max(multiply or load or [whole], key=len)
    widths: dict[int, int] = {}
    for name, _ in main:
        if _starts(name, LOADS):
            widths[_bits(name)] = widths.get(_bits(name), 0) + 1
    return {
        "loop_instructions": len(main) if main is not whole else 0,
        "load_bits": dict(sorted(widths.items())),
        "asynchronous": any(_starts(name, ("LDGSTS", "UBLKCP", "UTMALDG")) for name, _ in main),
        "products": sorted({name.split(".")[0] for name, _ in whole if _starts(name, PRODUCTS)}),
        "local_in_loop": sum(_starts(name, LOCAL) for name, _ in main),
    }


def blocking_loads(ttgir: str) -> list[int]:
    """For each loop of Triton's GPU code with asynchronous copies, how many blocking loads lie before its last copy.

    A load that is handed on to the next round as it is blocks nothing in this one.
    """
    found = []
    for body, handed_on in re.findall(r"scf\.for.*?\n(.*?)scf\.yield ([^:]*):", ttgir, re.DOTALL):
        copies = [match.start() for match in re.finditer(r"async_copy_global_to_local", body)]
        if copies:
            loads = re.findall(r"(%\w+) = tt\.load", body[: copies[-1]])
            found.append(len([name for name in loads if name not in re.findall(r"%\w+", handed_on)]))
    return found
