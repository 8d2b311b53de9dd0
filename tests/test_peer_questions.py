"""A question of a client is answered once, whatever becomes of the tracker and of the client."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.messages import Holders, Located, Status
from swarmcache.peer_events import (
    AnswerHolders,
    AnswerStatus,
    HoldersWanted,
    PeerEffect,
    StatusWanted,
)
from swarmcache.peer_questions import PeerQuestions

ACTIONS = ("status", "holders", "gone", "told status", "told holders", "connected", "lost")


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=40))
def test_every_question_is_answered_once_or_its_client_is_gone(
    steps: list[tuple[str, int]],
) -> None:
    questions = PeerQuestions("not yet")
    asked: dict[int, str] = {}
    gone: set[int] = set()
    effects: list[PeerEffect] = []
    for number, (action, some) in enumerate(steps):
        request = list(asked)[-1 - some] if some < len(asked) else -1
        match action:
            case "status":
                asked[number] = action
                questions.want_status(StatusWanted(number), effects)
            case "holders":
                asked[number] = action
                questions.want_holders(HoldersWanted(number, [b"a" * 32]), effects)
            case "gone":
                gone.add(request)
                questions.gone(request)
            case "told status":
                questions.told_status(Status(request, {}), effects)
            case "told holders":
                questions.told_holders(Located(request, [Holders(0)] * (1 + some // 5)), effects)
            case "connected":
                questions.tracker_connected()
            case "lost":
                questions.tracker_lost("gone", effects)
        questions.check()
    questions.tracker_lost("gone", effects)

    answers = Counter(
        effect.request for effect in effects if isinstance(effect, AnswerStatus | AnswerHolders)
    )
    assert set(asked) - gone <= answers.keys() <= set(asked)
    assert all(count == 1 for count in answers.values())
    for effect in effects:
        if isinstance(effect, AnswerStatus | AnswerHolders):
            assert isinstance(effect, AnswerStatus) == (asked[effect.request] == "status")
