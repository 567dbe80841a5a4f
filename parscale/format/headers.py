"""The header of a safetensors file: names, dtypes and shapes, checked against the size of the file before reading.

The format: 8 bytes with the length of the header, the header as JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from parscale.format.untrusted import brief, parse_json

_LARGEST_HEADER = 16 * 2**20  # enough for 100,000 tensors; reading the library's own limit, 100 MB, takes minutes
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_KEYS = ("dtype", "shape", "data_offsets")
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the safetensors file.
        dtype: as the format writes it (`"F32"`).
        shape: of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_size(self) -> int:
        """Bytes per number; 1 where the format packs several numbers into a byte."""
        return _BYTES.get(self.dtype, 1)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: it is not a safetensors file, or its header does not match its contents.
    """
    header, held = _read_json_header(path)
    header.pop("__metadata__", None)
    tensors = {name: _stored_tensor(path, name, entry, held) for name, entry in header.items()}
    try:  # the library does the remaining checks (gaps, overlaps)
        with safe_open(path, "pt"):
            return tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}): copy or save it again.") from error


def _read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the number of bytes of tensors after it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
            problem = f"its header should have {length} bytes, but the file has {size}"
            if length <= size - 8:
                problem = f"its header has {length} bytes, but at most {_LARGEST_HEADER} are read"
            if start.startswith(_PICKLE_STARTS):
                problem = "it looks like a pickle, which is not read because it can run any code"
            raise ValueError(f"{path} is truncated or not a safetensors file ({problem}): copy or save it again.")
        text = file.read(length)
    try:
        header = parse_json(text, _without_repeats)
    except ValueError as error:
        raise ValueError(f"The header of {path} cannot be read ({error}): copy or save the file again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"The header of {path} should be a JSON object, but is {type(header).__name__}.")
    return header, size - 8 - length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _stored_tensor(path: Path, name: str, entry: object, held: int) -> StoredTensor:
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in _KEYS)
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"The header of {path} does not describe {brief(name)} as a tensor: {brief(entry)}.")
    start, end = offsets
    if not start <= end <= held:
        raise ValueError(
            f"{path} should hold {brief(name)} in bytes {start} to {end} after its header, but there are {held}: "
            "it is truncated or damaged, copy or save it again."
        )
    tensor = StoredTensor(path, dtype, tuple(shape))
    if dtype in _BYTES and end - start != _numel(shape, held) * _BYTES[dtype]:
        raise ValueError(
            f"{path} should hold {brief(name)} as {brief(tensor.shape)} of {dtype} in {end - start} bytes, "
            "which does not match: its header is damaged."
        )
    return tensor


def _numel(shape: list[int], most: int) -> int:
    """The product of the sizes; if it exceeds `most`, any number above `most`."""
    if 0 in shape:
        return 0
    count = 1
    for size in shape:
        count *= size
        if count > most:
            break
    return count


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
