"""Paths that are named by their digests stand for what lies at or below them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache import path_digests
from swarmcache.path_digests import PathMatcher, path_digest

paths = st.lists(st.sampled_from([b"a", b"b", b"ab", b"\xff"]), min_size=1, max_size=4).map(
    lambda names: b"/" + b"/".join(names)
)


@given(st.lists(paths, min_size=1, max_size=3), st.lists(paths, max_size=20))
def test_a_path_stands_for_itself_and_for_all_below_it(
    wanted: list[bytes], files: list[bytes]
) -> None:
    matcher = PathMatcher([path_digest(path) for path in wanted])

    for file in files:
        expected = any((file + b"/").startswith(path + b"/") for path in wanted)
        assert matcher.matches(file) is expected


@pytest.mark.parametrize("digests", [[], [path_digest(b"/")]])
def test_no_path_and_the_root_stand_for_everything(digests: list[bytes]) -> None:
    assert PathMatcher(digests).matches(b"/nfs/corpus/train.hdf")


def test_a_slash_at_the_end_makes_no_difference() -> None:
    assert PathMatcher([path_digest(b"/nfs/corpus/")]).matches(b"/nfs/corpus/train.hdf")


def test_no_more_directories_are_remembered_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_digests, "DIRECTORIES_MAX", 3)
    matcher = PathMatcher([path_digest(b"/x/4")])

    found = [matcher.matches(b"/x/%d/file" % number) for number in range(9)]

    assert found == [number == 4 for number in range(9)]
    assert len(matcher._below) <= 3
