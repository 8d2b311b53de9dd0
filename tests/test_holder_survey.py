"""Whom a survey asks, and when it asks nobody any more."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.holder_survey import (
    ANSWER_S,
    ASKED_AT_ONCE,
    SURVEY_S,
    AskHolder,
    HolderAnswered,
    HolderSilent,
    HolderSurvey,
    StopAsking,
    SurveyEffect,
    SurveyEnded,
    SurveyEvent,
    SurveyWanted,
)
from swarmcache.messages import Holders, NodeAddress, ReplicaPlace
from swarmcache.peer_events import TimePassed

HELD = ReplicaPlace(b"/cache/ann", True)


def node(number: int) -> NodeAddress:
    return NodeAddress(f"n{number}:7381", 7382, f"n{number}")


def named(*numbers: int, count: int | None = None) -> Holders:
    """What the tracker says of one file version: these nodes, of ``count`` in all."""
    return Holders(len(numbers) if count is None else count, [node(number) for number in numbers])


class Bench:
    """One survey, and who is being asked."""

    def __init__(self, holders: Sequence[Holders], wanted: Sequence[int | None] = ()) -> None:
        self.survey = HolderSurvey(holders, wanted or [None] * len(holders))
        self.asking: list[str] = []
        self._ended = False

    def do(self, event: SurveyEvent, now_s: float = 0.0) -> list[SurveyEffect]:
        effects = self.survey.handle(event, now_s)
        self.survey.check()
        for effect in effects:
            match effect:
                case AskHolder():
                    self.asking.append(effect.address.node)
                case StopAsking():
                    self.asking.remove(effect.node)
                case SurveyEnded():
                    assert not self.asking and not self._ended
                    self._ended = True
        return effects

    def answer(self, number: int, *held: bool, now_s: float = 0.0) -> None:
        name = node(number).node
        if name in self.asking:
            self.asking.remove(name)
        self.do(HolderAnswered(name, [HELD if each else None for each in held]), now_s)

    def ended(self) -> bool:
        return self._ended

    def found(self, number: int = 0) -> list[str]:
        return [address.name for address, _ in self.survey.found(number)]


def test_nobody_is_asked_where_nobody_is_named() -> None:
    bench = Bench([named(), named()])
    bench.do(SurveyWanted())
    assert bench.ended()
    assert (bench.found(0), bench.survey.more(0)) == ([], 0)


def test_only_who_says_so_now_holds_a_file() -> None:
    bench = Bench([named(1, 2, 3)])
    bench.do(SurveyWanted())
    bench.answer(3, True)
    bench.answer(2, False)
    assert not bench.ended()
    bench.answer(1, True)

    assert bench.ended()
    assert bench.found() == ["n1", "n3"], "in the order of the tracker"
    assert bench.survey.more(0) == 0


def test_every_node_is_asked_once_about_all_files() -> None:
    """The tracker names some of those who hold a file; they may be the same for the next file."""
    bench = Bench([named(1, 2), named(2, 3, count=9)])
    bench.do(SurveyWanted())
    assert bench.asking == [node(number).node for number in (1, 2, 3)]
    bench.answer(1, True, True)
    bench.answer(2, True, True)
    bench.answer(3, False, True)

    assert (bench.found(0), bench.found(1)) == (["n1", "n2"], ["n1", "n2", "n3"])
    assert (bench.survey.more(0), bench.survey.more(1)) == (0, 6)


def test_no_more_than_some_are_asked_at_once() -> None:
    bench = Bench([named(*range(ASKED_AT_ONCE + 2))])
    bench.do(SurveyWanted())
    assert len(bench.asking) == ASKED_AT_ONCE
    bench.answer(0, True)
    assert len(bench.asking) == ASKED_AT_ONCE and node(ASKED_AT_ONCE).node in bench.asking


def test_who_does_not_answer_in_time_is_left_out_and_the_next_one_is_asked() -> None:
    bench = Bench([named(*range(ASKED_AT_ONCE + 1))])
    bench.do(SurveyWanted(), 10.0)
    for number in range(1, ASKED_AT_ONCE):
        bench.answer(number, True, now_s=10.5)
    last = ASKED_AT_ONCE
    assert bench.asking == [node(0).node, node(last).node]
    assert bench.survey.wake_at_s() == 10.0 + ANSWER_S

    bench.do(TimePassed(), 10.0 + ANSWER_S)
    assert bench.asking == [node(last).node]
    bench.answer(last, True, now_s=13.1)
    assert bench.ended() and bench.survey.wake_at_s() is None
    assert bench.found() == [f"n{number}" for number in range(1, last + 1)]
    assert bench.survey.silent() == [(node(0), "it did not answer in time")]
    assert bench.survey.more(0) == 0, "it was asked"
    bench.answer(0, True, now_s=14.0)
    assert "n0" not in bench.found(), "too late"


def test_who_cannot_be_reached_or_answers_nonsense_is_named() -> None:
    bench = Bench([named(1, 2), named(1)])
    bench.do(SurveyWanted())
    bench.asking.remove(node(1).node)
    bench.do(HolderSilent(node(1).node, "connection refused"))
    bench.answer(2, True)

    assert bench.ended() and bench.found() == []
    assert [reason for _, reason in bench.survey.silent()] == [
        "connection refused",
        "its answer makes no sense",
    ]


def test_it_ends_when_enough_holders_are_known() -> None:
    bench = Bench([named(1, 2, 3), named(2, 3)], [1, 1])
    bench.do(SurveyWanted())
    bench.answer(3, True, False)
    assert not bench.ended()
    bench.answer(2, True, True)

    assert bench.ended() and not bench.asking
    assert (bench.found(0), bench.found(1)) == (["n2"], ["n2"])
    assert (bench.survey.more(0), bench.survey.more(1)) == (2, 0)


def test_nobody_is_asked_for_a_file_of_which_enough_is_known_before() -> None:
    bench = Bench([named(1, 2), named(3)], [0, 1])
    bench.do(SurveyWanted())
    assert bench.asking == [node(3).node]
    bench.answer(3, False, True)
    assert bench.ended() and (bench.survey.more(0), bench.survey.more(1)) == (2, 0)


def test_it_ends_in_time_however_many_do_not_answer() -> None:
    bench = Bench([named(*range(128))])
    bench.do(SurveyWanted())
    now_s = 0.0
    while not bench.ended():
        wake_at_s = bench.survey.wake_at_s()
        assert wake_at_s is not None and wake_at_s > now_s
        now_s = wake_at_s
        bench.do(TimePassed(), now_s)
    assert now_s <= SURVEY_S
    assert bench.survey.more(0) > 0, "those that were never asked"
    assert bench.survey.more(0) + len(bench.survey.silent()) == 128


@given(
    st.lists(st.lists(st.integers(0, 50), unique=True, max_size=50), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(0, 5)),
    st.integers(0, 2**32),
)
def test_whatever_nodes_do_it_ends_and_counts_right(
    names: list[list[int]], limit: int | None, seed: int
) -> None:
    rng = Random(seed)
    bench = Bench([named(*each) for each in names], [limit] * len(names))
    now_s, answers = 0.0, dict[str, list[bool]]()
    bench.do(SurveyWanted(), now_s)
    while not bench.ended():
        assert now_s < SURVEY_S
        chosen = rng.choice(bench.asking)
        match rng.randrange(4):
            case 0:
                bench.asking.remove(chosen)
                bench.do(HolderSilent(chosen, "gone"), now_s)
            case 1:
                now_s = max(now_s, bench.survey.wake_at_s() or 0.0)
                bench.do(TimePassed(), now_s)
            case _:
                bench.asking.remove(chosen)
                answers[chosen] = [rng.random() < 0.7 for _ in names]
                places = [HELD if each else None for each in answers[chosen]]
                bench.do(HolderAnswered(chosen, places), now_s)
    silent = {address.node for address, _ in bench.survey.silent()}
    for number, each in enumerate(names):
        yes = {name for name, held in answers.items() if held[number]}
        found = bench.survey.found(number)
        assert len(found) == min(len(yes), len(yes) if limit is None else limit)
        assert {address.node for address, _ in found} <= yes
        settled = {node(n).node for n in each} & (answers.keys() | silent) | yes
        unknown = max(0, len(each) - len(settled))
        assert bench.survey.more(number) == unknown + len(yes) - len(found)
