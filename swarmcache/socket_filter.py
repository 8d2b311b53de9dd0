"""Let the kernel drop datagrams that cannot be ours, and ask it how many it has dropped.

What is dropped there costs the daemon nothing: neither a wake-up nor a copy. The filter is a
program of seven instructions (classic BPF, which needs no privilege) that looks at the size of a
datagram and at its first byte. It only saves work: whoever receives must check all the same, since
not every kernel takes a filter.
"""

from __future__ import annotations

import ctypes
import socket
import struct

# linux/filter.h, linux/bpf_common.h, asm-generic/socket.h, linux/sock_diag.h
SO_ATTACH_FILTER = 26
_SO_MEMINFO = 55
_SK_MEMINFO_DROPS = 8
_LOAD_LENGTH = 0x80
_LOAD_BYTE_AT = 0x30
_IF_AT_LEAST = 0x35
_IF_MORE_THAN = 0x25
_IF_EQUAL = 0x15
_RETURN = 0x06
_INSTRUCTION = struct.Struct("=HBBI")  # code, instructions to skip if true, if false, operand
# What a filter of a UDP socket sees begins with the UDP header.
_UDP_HEADER_BYTES = 8
_WHOLE = 0xFFFFFFFF


def drop_others(sock: socket.socket, size_min: int, size_max: int, first_byte: int) -> None:
    """From now on a UDP socket takes in only datagrams whose payload has so many bytes and begins
    with this one. Raises OSError where the kernel takes no filter."""
    program = b"".join(
        [
            _INSTRUCTION.pack(_LOAD_LENGTH, 0, 0, 0),
            _INSTRUCTION.pack(_IF_AT_LEAST, 0, 4, _UDP_HEADER_BYTES + size_min),
            _INSTRUCTION.pack(_IF_MORE_THAN, 3, 0, _UDP_HEADER_BYTES + size_max),
            _INSTRUCTION.pack(_LOAD_BYTE_AT, 0, 0, _UDP_HEADER_BYTES),
            _INSTRUCTION.pack(_IF_EQUAL, 0, 1, first_byte),
            _INSTRUCTION.pack(_RETURN, 0, 0, _WHOLE),
            _INSTRUCTION.pack(_RETURN, 0, 0, 0),
        ]
    )
    instructions = ctypes.create_string_buffer(program, len(program))
    count = len(program) // _INSTRUCTION.size
    fprog = struct.pack("@HP", count, ctypes.addressof(instructions))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)


def dropped(sock: socket.socket) -> int:
    """How many datagrams the kernel has dropped on this socket, by a filter or because nobody read
    them in time, modulo 2**32. 0 where it does not say."""
    size_bytes = 4 * (_SK_MEMINFO_DROPS + 1)
    try:
        values = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, size_bytes)
    except OSError:  # older than Linux 4.12
        return 0
    if len(values) < size_bytes:
        return 0
    return int(struct.unpack_from("=I", values, 4 * _SK_MEMINFO_DROPS)[0])
