"""The master's side of one resource: queues, blocking notifications, value blocks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lockmgr.errors import ProtocolViolation
from lockmgr.messages import (
    AskGlimpse,
    Blocking,
    Cancel,
    GlimpseAnswer,
    Granted,
    Lower,
    NodeBound,
    Probe,
    Refused,
    Request,
    Resource,
    Unblocking,
    ValueBlock,
)
from lockmgr.modes import Mode, covers
from lockmgr.resource import Master, MasteredResource
from tests.unit.lockmgr_naive import NaiveMaster

NL, CR, CW, PR, PW, EX = Mode
R = Resource(b"r", b"p")
VALUE = b"v" * 64


class Script:
    """A master's resource, spoken to in one line each."""

    def __init__(self) -> None:
        self.machine = MasteredResource(R, epoch=7)

    def ask(self, node: int, mode: Mode, *, queue: bool = True, serial: int = 1) -> list[str]:
        return self._step(Request(R, 7, node, serial, mode, queue))

    def cancel(self, node: int, serial: int = 1) -> list[str]:
        return self._step(Cancel(R, 7, node, serial))

    def lower(self, node: int, mode: Mode | None, value: ValueBlock | None = None) -> list[str]:
        grant = self.machine.granted_serial(node)
        return self._step(Lower(R, 7, node, grant, mode, value))

    def _step(self, message: Request | Cancel | Lower) -> list[str]:
        said = self.machine.step(message)
        self.machine.check()
        assert all(answer.epoch == 7 and answer.resource is R for answer in said)
        return [_words(answer) for answer in said]


def _words(answer: NodeBound) -> str:
    match answer:
        case Granted():
            return f"{answer.node} granted {answer.mode}"
        case Refused():
            return f"{answer.node} refused"
        case Blocking():
            return f"{answer.node} blocks {answer.mode}"
        case Unblocking():
            return f"{answer.node} blocks only {answer.mode}"
        case _:
            return type(answer).__name__


@pytest.fixture
def script() -> Script:
    return Script()


def test_compatible_requests_are_granted_at_once(script: Script) -> None:
    assert script.ask(1, PR) == ["1 granted PR"]
    assert script.ask(2, PR) == ["2 granted PR"]
    assert script.ask(3, CR) == ["3 granted CR"]


def test_a_request_waits_and_the_holder_is_told_once(script: Script) -> None:
    script.ask(1, EX)
    assert script.ask(2, PR) == ["1 blocks PR"]
    assert script.ask(3, PR) == ["1 blocks PR"], "each blocked request tells for itself"
    assert script.lower(1, PR) == ["2 granted PR", "3 granted PR"]


def test_only_incompatible_holders_are_told(script: Script) -> None:
    script.ask(1, CR)
    script.ask(2, PR)
    script.ask(3, PR)
    assert script.ask(4, PW) == ["2 blocks PW", "3 blocks PW"]
    assert script.lower(2, None) == []
    assert script.lower(3, CR) == ["4 granted PW"]


def test_new_requests_do_not_overtake(script: Script) -> None:
    script.ask(1, PR)
    script.ask(2, EX)
    assert script.ask(3, PR) == [], "PR beside PR would fit, but EX came first"
    assert script.lower(1, None) == ["2 granted EX", "2 blocks PR"]
    assert script.lower(2, None) == ["3 granted PR"]


def test_null_is_granted_whatever_waits(script: Script) -> None:
    script.ask(1, EX)
    script.ask(2, EX)
    assert script.ask(3, NL) == ["3 granted NL"]


def test_conversions_come_before_new_requests(script: Script) -> None:
    script.ask(1, PR)
    script.ask(2, PR)
    assert script.ask(3, EX) == ["1 blocks EX", "2 blocks EX"]
    assert script.ask(1, EX, serial=2) == ["2 blocks EX"]
    assert script.lower(2, None) == ["1 granted EX", "1 blocks EX"]


def test_conversions_keep_their_order(script: Script) -> None:
    for node in (1, 2, 3):
        script.ask(node, CR)
    script.ask(4, PR)
    script.ask(1, CW, serial=2)
    script.ask(2, CW, serial=2)
    assert script.lower(4, None) == ["1 granted CW", "2 granted CW"]


def test_a_conversion_that_stands_in_the_way_overtakes(script: Script) -> None:
    script.ask(1, CR)
    script.ask(2, PR)
    assert script.ask(1, EX, serial=2) == ["2 blocks EX"]
    assert script.ask(2, PW, serial=2) == ["2 granted PW", "2 blocks EX"]
    assert script.lower(2, None) == ["1 granted EX"]


def test_a_conversion_from_null_does_not_overtake(script: Script) -> None:
    script.ask(1, CR)
    script.ask(2, PR)
    script.ask(3, NL)
    script.ask(1, EX, serial=2)
    assert script.ask(3, CR, serial=2) == []
    assert script.lower(2, None) == ["1 granted EX", "1 blocks CR"]


def test_two_conversions_that_block_each_other_end_when_one_lowers(script: Script) -> None:
    script.ask(1, PR)
    script.ask(2, PR)
    assert script.ask(1, EX, serial=2) == ["2 blocks EX"]
    assert script.ask(2, EX, serial=2) == ["1 blocks EX"]
    assert script.lower(2, NL) == ["1 granted EX", "1 blocks EX"]
    assert script.lower(1, None) == ["2 granted EX"]


def test_a_new_grant_is_told_of_those_who_wait(script: Script) -> None:
    script.ask(1, PR)
    assert script.ask(2, EX) == ["1 blocks EX"]
    assert script.ask(1, PW, serial=2) == ["1 granted PW", "1 blocks EX"]


def test_without_queueing_nobody_is_told(script: Script) -> None:
    script.ask(1, EX)
    assert script.ask(2, PR, queue=False) == ["2 refused"]
    assert script.ask(3, CR, queue=False) == ["3 refused"]
    assert script.lower(1, PR) == []
    assert script.ask(2, PR, queue=False, serial=2) == ["2 granted PR"]
    assert script.ask(1, EX, queue=False, serial=2) == ["1 refused"]


def test_cancel_lets_those_behind_go_and_takes_back_what_was_told(script: Script) -> None:
    script.ask(1, PR)
    script.ask(2, EX)
    script.ask(3, PR)
    assert script.cancel(2) == ["2 refused", "1 blocks only NL", "3 granted PR"]
    assert script.cancel(2) == [], "too late, or twice: no answer"


def test_cancel_leaves_what_others_still_want(script: Script) -> None:
    script.ask(1, EX)
    script.ask(2, EX)
    script.ask(3, PR)
    assert script.cancel(2) == ["2 refused", "1 blocks only PR"]
    script.ask(4, PR)
    assert script.cancel(3) == ["3 refused"], "node 1 is still to make room for PR"


def test_cancel_of_another_request_changes_nothing(script: Script) -> None:
    script.ask(1, EX)
    script.ask(2, PR, serial=5)
    assert script.cancel(2, serial=4) == []
    assert script.lower(1, None) == ["2 granted PR"]


def _value_granted(script: Script, node: int, mode: Mode, serial: int = 1) -> ValueBlock:
    (granted,) = script.machine.step(Request(R, 7, node, serial, mode, queue=True))
    assert isinstance(granted, Granted)
    return granted.value


def test_value_block_travels_from_writer_to_reader(script: Script) -> None:
    assert _value_granted(script, 1, EX) == ValueBlock(None, 0)
    script.lower(1, PR, ValueBlock(VALUE, 1))
    assert _value_granted(script, 2, PR) == ValueBlock(VALUE, 1)
    script.lower(1, None)
    script.lower(2, None)
    assert script.machine.empty


def test_value_block_can_be_made_not_valid(script: Script) -> None:
    script.ask(3, NL)
    script.ask(1, EX)
    script.lower(1, NL, ValueBlock(VALUE, 1))
    script.ask(1, EX, serial=2)
    script.lower(1, NL, ValueBlock(None, 2))
    assert _value_granted(script, 2, PR) == ValueBlock(None, 2)


@pytest.mark.parametrize("mode", [CR, CW, PR])
def test_value_block_is_not_written_by_readers(script: Script, mode: Mode) -> None:
    script.ask(1, mode)
    with pytest.raises(ProtocolViolation):
        script.lower(1, None, ValueBlock(VALUE, 1))


def test_an_older_value_block_is_refused(script: Script) -> None:
    script.ask(1, EX)
    script.lower(1, NL, ValueBlock(VALUE, 1))
    script.ask(1, EX, serial=2)
    for older in (ValueBlock(None, 1), ValueBlock(VALUE, 0)):
        with pytest.raises(ProtocolViolation):
            script.lower(1, NL, older)


def test_a_value_block_that_was_reasserted_may_come_again(script: Script) -> None:
    script.machine.restore(1, EX, serial=1)
    script.machine.value = ValueBlock(VALUE, 3)
    script.lower(1, NL, ValueBlock(VALUE, 3))
    assert script.machine.value == ValueBlock(VALUE, 3)


def test_value_blocks_have_64_bytes() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        ValueBlock(b"short", 1)


def test_resource_names_have_1_to_32_bytes() -> None:
    assert Resource(b"x" * 32, b"").name == b"x" * 32
    for name in (b"", b"x" * 33):
        with pytest.raises(ValueError, match="32"):
            Resource(name, b"")
    assert hash(Resource(b"a", b"p")) == hash(Resource(b"a", b"p"))
    assert Resource(b"a", b"p") == Resource(b"a", b"p") != Resource(b"b", b"p")


def test_impossible_messages_are_refused(script: Script) -> None:
    with pytest.raises(ProtocolViolation):
        script.lower(1, None)
    script.ask(1, PR)
    with pytest.raises(ProtocolViolation):
        script.lower(1, EX)
    script.ask(2, EX)
    with pytest.raises(ProtocolViolation):
        script.ask(2, PR)
    script.ask(1, EX, serial=2)
    script.lower(1, NL)
    with pytest.raises(ProtocolViolation):
        script.lower(9, None)


def test_a_grant_prevails_over_a_lowering_that_crosses_it(script: Script) -> None:
    script.ask(1, PW)
    script.ask(2, CR)
    script.ask(3, CR)
    assert script.ask(1, EX, serial=2) == ["2 blocks EX", "3 blocks EX"]
    script.lower(2, None)
    assert script.lower(3, None) == ["1 granted EX"]
    crossing = Lower(R, 7, 1, 1, NL, ValueBlock(VALUE, 1))
    assert script.machine.step(crossing) == []
    assert script.machine.granted == {1: EX}
    assert script.machine.value == ValueBlock(VALUE, 1), "what was written counts all the same"
    assert script.ask(2, PR) == ["1 blocks PR"]


def test_release_of_a_converting_lock_is_refused(script: Script) -> None:
    script.ask(1, PR)
    script.ask(2, PR)
    script.ask(1, EX, serial=2)
    with pytest.raises(ProtocolViolation):
        script.lower(1, None)


def test_glimpse_goes_to_the_writer_or_comes_back_empty(script: Script) -> None:
    question = AskGlimpse(R, 7, 2, 33)
    assert script.machine.step(question) == [GlimpseAnswer(R, 7, 2, 33, None)]
    script.ask(1, PR)
    assert script.machine.step(question) == [GlimpseAnswer(R, 7, 2, 33, None)]
    script.ask(1, EX, serial=2)
    assert script.machine.step(question) == [Probe(R, 7, 1, 2, 33)]


def test_master_forgets_what_nobody_holds() -> None:
    master = Master(epoch=1)
    master.step(Request(R, 1, 1, 1, EX, queue=True))
    master.step(Lower(R, 1, 1, 1, None, ValueBlock(VALUE, 1)))
    assert not master.resources
    (granted,) = master.step(Request(R, 1, 2, 1, PR, queue=True))
    assert isinstance(granted, Granted) and granted.value == ValueBlock(None, 0)
    master.check()


NODES = (1, 2, 3, 4)


class MasterAgainstNaive(RuleBasedStateMachine):
    """Any messages that nodes may send: the same answers as the naive master's."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = MasteredResource(R, epoch=1)
        self.naive = NaiveMaster()
        self.serial = 0

    def _step(self, message: Request | Cancel | Lower) -> None:
        said = self.machine.step(message)
        plain: list[tuple[object, ...]] = []
        for answer in said:
            match answer:
                case Granted():
                    value = (answer.value.data, answer.value.sequence)
                    plain.append(("granted", answer.node, answer.serial, int(answer.mode), value))
                case Refused():
                    plain.append(("refused", answer.node, answer.serial))
                case Blocking():
                    plain.append(("blocking", answer.node, int(answer.mode)))
                case Unblocking():
                    self._check_unblocking(answer)
        assert plain == self.naive.said
        self.naive.said.clear()

    def _check_unblocking(self, answer: Unblocking) -> None:
        left = [
            Mode(request.mode)
            for request in self.naive.converting + self.naive.waiting
            if (answer.node, request.node, request.serial) in self.naive.told
        ]
        assert all(covers(answer.mode, mode) for mode in left)

    def _waits(self, node: int) -> bool:
        return any(r.node == node for r in self.naive.converting + self.naive.waiting)

    @rule(node=st.sampled_from(NODES), mode=st.sampled_from(Mode), queue=st.booleans())
    def request(self, node: int, mode: Mode, queue: bool) -> None:
        if self._waits(node):
            return
        self.serial += 1
        self.naive.request(node, self.serial, int(mode), queue)
        self._step(Request(R, 1, node, self.serial, mode, queue))

    @precondition(lambda self: self.naive.converting or self.naive.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        queued = self.naive.converting + self.naive.waiting
        request = data.draw(st.sampled_from(queued))
        self.naive.cancel(request.node, request.serial)
        self._step(Cancel(R, 1, request.node, request.serial))

    @precondition(lambda self: self.naive.held)
    @rule(data=st.data(), write=st.booleans())
    def lower(self, data: st.DataObject, write: bool) -> None:
        node = data.draw(st.sampled_from(sorted(self.naive.held)))
        held = Mode(self.naive.held[node])
        choices: list[Mode | None] = [mode for mode in Mode if covers(held, mode)]
        if not self._waits(node):
            choices.append(None)
        mode = data.draw(st.sampled_from(choices))
        value = None
        if write and held in (PW, EX):
            value = ValueBlock(bytes(64), self.naive.value[1] + 1)
        self.naive.lower(
            node,
            None if mode is None else int(mode),
            None if value is None else (value.data, value.sequence),
        )
        self._step(Lower(R, 1, node, self.machine.granted_serial(node), mode, value))

    @invariant()
    def same_state(self) -> None:
        self.machine.check()
        assert self.machine.granted == self.naive.held
        for ours, theirs in (
            (self.machine.converting, self.naive.converting),
            (self.machine.waiting, self.naive.waiting),
        ):
            assert [(q.node, q.serial, q.mode) for q in ours] == [
                (q.node, q.serial, q.mode) for q in theirs
            ]

    def teardown(self) -> None:
        """When every holder lets go, nobody is left waiting."""
        while self.naive.held:
            node = min(self.naive.held, key=lambda node: (self._waits(node), node))
            mode = 0 if self._waits(node) else None
            if mode == 0 and self.naive.held[node] == 0:
                assert not all(self.naive.held[n] == 0 for n in self.naive.held)
                node = next(n for n in self.naive.held if self.naive.held[n] != 0)
            self.naive.lower(node, mode, None)
            grant = self.machine.granted_serial(node)
            self._step(Lower(R, 1, node, grant, None if mode is None else NL))
        assert not self.naive.waiting and not self.naive.converting
        assert self.machine.empty


TestMasterAgainstNaive = MasterAgainstNaive.TestCase
TestMasterAgainstNaive.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
