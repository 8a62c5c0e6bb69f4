#!/usr/bin/env python3
"""Refuses machine code that stops a card: ptxas 13.0 may write an asynchronous copy that no card has.

    scripts/check_cuda_code.py FILE...        objects, cubins or the extension

A copy to shared memory (LDGSTS) with a cache policy has no form whose address is the sum of a lane's register and a
uniform one, and ptxas takes that form where it sees a uniform part (csrc/cuda/ptx.cuh). Such a kernel ends with "an
illegal instruction was encountered". Whether it does changes with the code around it, so this looks at every kernel.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CUBIN = b"\x7fELF\x02\x01"
CUDA = 190  # e_machine
OPCODE, LDGSTS = 0x1FF, 0x1AE
FORM, LANES_OWN = 0xE00, 0xE00


def kernels(file: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and instructions of every kernel of the cubins inside `file`."""
    at = file.find(CUBIN)
    while at >= 0:
        cubin = file[at:]
        if struct.unpack_from("<H", cubin, 18)[0] == CUDA:
            (table,), (count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3C)
            sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
            for name_at, _, _, _, begin, size in sections:
                start = sections[names][4] + name_at
                name = cubin[start : cubin.index(b"\0", start)].decode()
                if name.startswith(".text."):
                    yield name.removeprefix(".text."), cubin[begin : begin + size]
        at = file.find(CUBIN, at + 1)


def bad_copies(instructions: bytes) -> list[int]:
    """Addresses of copies in the form that does not exist. An instruction has 16 bytes, the lowest bits its opcode."""
    return [
        16 * i
        for i, (low, _) in enumerate(struct.iter_unpack("<QQ", instructions))
        if low & OPCODE == LDGSTS and low & FORM != LANES_OWN
    ]


def main() -> None:
    found = 0
    for file in sys.argv[1:]:
        for name, instructions in kernels(Path(file).read_bytes()):
            found += 1
            if bad := bad_copies(instructions):
                sys.exit(f"{file}: the kernel {name} has an instruction at {bad[0]:#x} that no card has")
    if not found:
        sys.exit(f"check_cuda_code: no kernels in {' '.join(sys.argv[1:]) or 'no files'}")
    print(f"{found} kernels: no instruction that ptxas gets wrong")


if __name__ == "__main__":
    main()
