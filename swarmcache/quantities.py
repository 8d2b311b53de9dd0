"""Sizes, durations, rates and addresses as people write them.

The ``parse`` functions take what a TOML file, an environment variable or an option holds (a number
or a text) and return the value in the unit that their callers' names end in. They raise ValueError,
whose text says what was expected and is fit to follow the word "expected".

Pure values: nothing here knows a setting, a file or a socket.

Invariant: what a ``format`` function or ``str()`` writes, its ``parse`` reads back exactly.
"""

from __future__ import annotations

import ipaddress
import re
from decimal import Decimal

from msgspec import Struct

DURATION_MAX_S = 3650 * 86400.0
SIZE_MAX_BYTES = (1 << 63) - 1  # off_t
COUNT_MAX = 1_000_000

# A single letter is a power of 1024, as in Slurm's --mem and in coreutils.
SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgtp", 1)},
}
DURATION_UNITS_S = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
SIZE_EXPECTED = 'a size such as 500000, "500MB" or "5GiB"'
DURATION_EXPECTED = 'a duration such as 30, "250ms", "30s", "1h" or "1h30m"'


def parse_size(value: object) -> int:
    """Bytes. Fractions of a byte are dropped: "1.5KiB" is 1536. Raises ValueError."""
    match = _match(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", value)
    if match is None or match[2] not in SIZE_UNITS:
        raise ValueError(SIZE_EXPECTED)
    size_bytes = int(Decimal(match[1]) * SIZE_UNITS[match[2]])
    if size_bytes > SIZE_MAX_BYTES:
        raise ValueError(f"{SIZE_EXPECTED}, less than 8EiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The shortest exact spelling in binary units: ``parse_size`` gives the same number back."""
    for letter, power in zip("PTGMK", range(5, 0, -1), strict=True):
        if size_bytes and size_bytes % 1024**power == 0:
            return f"{size_bytes // 1024**power}{letter}iB"
    return f"{size_bytes}B"


def parse_duration(value: object) -> float:
    """Seconds. A bare number is seconds. Raises ValueError."""
    number = _match(r"[0-9]+(?:\.[0-9]+)?", value)
    parts = [(number[0], "s")] if number else _duration_parts(value)
    if not parts or any(unit not in DURATION_UNITS_S for _, unit in parts):
        raise ValueError(DURATION_EXPECTED)
    duration_s = float(sum(Decimal(number) * DURATION_UNITS_S[unit] for number, unit in parts))
    if duration_s > DURATION_MAX_S:
        raise ValueError(f"{DURATION_EXPECTED}, at most {format_duration(DURATION_MAX_S)}")
    return duration_s


def format_duration(duration_s: float) -> str:
    """The shortest exact spelling: ``parse_duration`` gives the same number back."""
    for unit in ("d", "h", "m"):
        unit_s = float(DURATION_UNITS_S[unit])
        if duration_s and duration_s % unit_s == 0:
            return f"{int(duration_s / unit_s)}{unit}"
    exact = Decimal(repr(duration_s))
    if 0 < duration_s < 1 and exact * 1000 == int(exact * 1000):
        return f"{int(exact * 1000)}ms"
    text = f"{exact:f}"
    return (text.removesuffix(".0") if text.endswith(".0") else text) + "s"


def parse_duration_above_zero(value: object) -> float:
    """Seconds, more than none. Raises ValueError."""
    duration_s = parse_duration(value)
    if duration_s == 0:
        raise ValueError(f"{DURATION_EXPECTED}, more than 0")
    return duration_s


def parse_rate(value: object) -> int:
    """Bytes per second; "100MB/s" and "100MB" are the same. Raises ValueError."""
    text = value.strip().removesuffix("/s") if isinstance(value, str) else value
    try:
        rate_bytes_per_s = parse_size(text)
    except ValueError as error:
        raise ValueError('bytes per second, such as "100MB/s"') from error
    if rate_bytes_per_s == 0:
        raise ValueError('bytes per second, such as "100MB/s", more than 0')
    return rate_bytes_per_s


def parse_count(value: object) -> int:
    """A whole number from 1 to ``COUNT_MAX``. Raises ValueError."""
    match = _match(r"[0-9]{1,9}", value)
    if match is None or not 1 <= int(match[0]) <= COUNT_MAX:
        raise ValueError(f"a whole number from 1 to {COUNT_MAX}")
    return int(match[0])


def parse_truth(value: object) -> bool:
    """True or False, in an environment variable also as 1 or 0. Raises ValueError."""
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if found is None:
        raise ValueError("true or false")
    return found


def _match(pattern: str, value: object) -> re.Match[str] | None:
    """Match the whole of a text or number, in lower case."""
    if not isinstance(value, (str, int, float)):
        return None
    return re.fullmatch(pattern, str(value).strip().lower())


def _duration_parts(value: object) -> list[tuple[str, str]]:
    part = r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*"
    match = _match(f"(?:{part})+", value)
    return re.findall(part, match[0]) if match else []


class HostPort(Struct, frozen=True):
    """A network address. Port 0 asks for a free one, and when advertised stands for that one."""

    host: str
    port: int

    @classmethod
    def parse(cls, value: object) -> HostPort:
        """Read ``host:port``; an IPv6 address goes in brackets. Raises ValueError."""
        expected = "host:port, such as node1:7381 or [fd00::1]:7381"
        text = value.strip() if isinstance(value, str) else ""
        match = re.fullmatch(r"(?:\[([^\]]+)\]|([^\[\]:/@\s]+)):([0-9]{1,5})", text)
        if match is None or int(match[3]) > 65535:
            raise ValueError(expected)
        try:
            if match[1] is not None:
                ipaddress.IPv6Address(match[1])
            elif not re.fullmatch(rb"[\w.-]{1,253}", match[2].encode("idna")):  # as it is looked up
                raise ValueError(expected)
        except ValueError as error:  # so it is where a part of a name is empty or too long
            raise ValueError(expected) from error
        return cls(match[1] or match[2], int(match[3]))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. Of names, only ``localhost`` is known to be."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return self.host == "localhost"

    @property
    def is_unspecified(self) -> bool:
        """Whether it stands for all addresses of a machine: to listen on, not to be reached at."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:  # a name
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class DiskLimit(Struct, frozen=True):
    """An amount of disk space: ``size_bytes``, or where that is None, a share of the disk."""

    size_bytes: int | None
    per_cent: float = 0.0

    @classmethod
    def parse(cls, value: object) -> DiskLimit:
        """Read "5%" or a size. Raises ValueError."""
        match = _match(r"([0-9]+(?:\.[0-9]+)?)\s*%", value)
        if match and float(match[1]) <= 100:
            return cls(None, float(match[1]))
        try:
            return cls(parse_size(value))
        except ValueError as error:
            raise ValueError(f'{SIZE_EXPECTED}, or "0%" to "100%" of the disk') from error

    def resolve_bytes(self, capacity_bytes: int) -> int:
        """The amount on a disk of this capacity, rounded down; never more than the disk."""
        if self.size_bytes is None:
            return int(capacity_bytes * Decimal(repr(self.per_cent)) / 100)
        return min(self.size_bytes, capacity_bytes)

    def __str__(self) -> str:
        if self.size_bytes is None:
            return f"{Decimal(repr(self.per_cent)).normalize():f}%"
        return format_size(self.size_bytes)
