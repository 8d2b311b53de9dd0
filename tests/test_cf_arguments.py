"""The command line of the old client, with the oddities that its callers rely on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.cf_arguments import (
    COPY,
    DESTINATION,
    HELP,
    LOCATE,
    PING,
    VERSION,
    Arguments,
    parse,
)
from swarmcache.errors import UsageError


def found(words: str) -> dict[str, Any]:
    """What differs from a plain ``cf``."""
    arguments, plain = parse(words.split()), Arguments()
    return {
        name: getattr(arguments, name)
        for name in Arguments.__slots__
        if getattr(arguments, name) != getattr(plain, name)
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("F", {"names": ["F"]}),
        ("-cp S D", {"mode": COPY, "names": ["S", "D"]}),
        ("--copy S D --noregister", {"mode": COPY, "names": ["S", "D"], "register": False}),
        ("S -n D -cp", {"mode": COPY, "names": ["S", "D"], "register": False}),
        ("-l F G", {"mode": LOCATE, "names": ["F", "G"]}),
        ("F --locate G", {"mode": LOCATE, "names": ["F", "G"]}),
        ("-ll 2 F", {"mode": LOCATE, "names": ["F"], "limit": 2}),
        ("-ll 0 F", {"mode": LOCATE, "names": ["F"]}),
        ("F --locate-limit 1", {"mode": LOCATE, "names": ["F"], "limit": 1}),
        ("-d F", {"mode": DESTINATION, "names": ["F"]}),
        ("F --destination", {"mode": DESTINATION, "names": ["F"]}),
        ("F --bundle --conjunct", {"names": ["F"], "bundle": True, "conjunct": True}),
        ("--nobundle F --debug", {"names": ["F"], "bundle": False, "debug": True}),
        ("--config C F", {"names": ["F"], "config_file": "C"}),
        ("--ping", {"mode": PING}),
        ("-h", {"mode": HELP}),
        ("-V", {"mode": VERSION}),
        ("-", {"names": ["-"]}),
        ("-- -F", {"names": ["-F"]}),
        ("-l -- -F -- --debug", {"mode": LOCATE, "names": ["-F", "--", "--debug"]}),
        ("-cp S -- -D", {"mode": COPY, "names": ["S", "-D"]}),
        (
            "--frobnicate F",
            {"names": ["F"], "remarks": ["WARN: unknown option: '--frobnicate'"]},
        ),
        ("F G H", {"names": ["F", "G", "H"], "remarks": ["WARN: ignored: 'G' 'H'"]}),
        (
            "-m 3 F",
            {
                "names": ["F"],
                "remarks": ["WARN: -m has no meaning any more: all copies are used"],
            },
        ),
    ],
)
def test_options_may_stand_anywhere_and_unknown_ones_are_no_error(
    words: str, expected: dict[str, Any]
) -> None:
    assert found(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "FILE is missing"),
        ("--", "FILE is missing"),
        ("-l", "FILE is missing"),
        ("-cp S", "-cp needs SOURCE and DESTINATION"),
        ("F --config", "--config needs a value"),
        ("F -ll", "-ll needs a value"),
        ("-ll F", "-ll 'F': expected a number, such as 2"),
        ("-m -1 F", "-m '-1': expected a number, such as 2"),
    ],
)
def test_what_is_missing_is_named(words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words.split())

    assert str(caught.value) == message


NAMES = st.text().filter(lambda name: not name.startswith("-"))


@given(st.lists(NAMES, min_size=1), st.lists(st.text()))
def test_names_are_never_cut_or_lost(names: list[str], more: list[str]) -> None:
    """An old client was called through a shell that split names at white space."""
    assert parse(["-l", *names, "--", *more]).names == names + more
