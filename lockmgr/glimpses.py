"""Many glimpses in one message: what a step says to one node of them leaves as one `Glimpses`.

Whoever lists a directory asks for all its files in one step; each master so gets one message, each
holder one from each master, and answers with one. Nothing else knows of that: what a `Glimpses`
carries is carried out as if it had come one by one, and what is alone leaves alone. Pure.

Order. Channels are FIFO, so nothing overtakes: a bundle to a node ends where the step says
something else to it. Within a bundle questions, probes and answers are independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from lockmgr.events import Effect, Send
from lockmgr.messages import AskGlimpse, GlimpseAnswer, Glimpses, Probe

PER_MESSAGE: Final = 128
"""Glimpses in one message."""
BYTES_PER_MESSAGE: Final = 1 << 15
"""Of answers, beyond which another message begins."""

Bundled = AskGlimpse | Probe | GlimpseAnswer


@dataclass(slots=True)
class _Bundle:
    place: int
    """Of its first effect among those that leave."""
    messages: list[Bundled] = field(default_factory=list)
    answer_bytes: int = 0

    def takes(self, message: Bundled) -> bool:
        """Is there room?"""
        size = _answer_bytes(message)
        room = len(self.messages) < PER_MESSAGE and self.answer_bytes + size <= BYTES_PER_MESSAGE
        return room or not self.messages


def bundle(effects: Sequence[Effect], node: int) -> list[Effect]:
    """The effects of a step of ``node``, its glimpses to each other node together."""
    out: list[Effect] = []
    bundles: list[_Bundle] = []
    current: dict[int, _Bundle] = {}
    for effect in effects:
        if type(effect) is Send:
            message = effect.message
            if isinstance(message, Bundled):
                found = current.get(effect.to)
                if found is not None and found.takes(message):
                    found.messages.append(message)
                    found.answer_bytes += _answer_bytes(message)
                    continue
                found = current[effect.to] = _Bundle(len(out), [message], _answer_bytes(message))
                bundles.append(found)
            else:
                current.pop(effect.to, None)
        out.append(effect)
    for made in bundles:
        if len(made.messages) > 1:
            alone = out[made.place]
            assert type(alone) is Send
            out[made.place] = Send(alone.to, _together(made.messages, node))
    return out


def unbundle(message: Glimpses, node: int) -> Iterator[Bundled]:
    """What ``message``, which ``node`` was sent, stands for."""
    for resource, serial in message.asked:
        yield AskGlimpse(resource, message.epoch, message.node, serial)
    for resource, asker, serial in message.probes:
        yield Probe(resource, message.epoch, node, asker, serial)
    for resource, serial, answer in message.answers:
        yield GlimpseAnswer(resource, message.epoch, node, serial, answer)


def _answer_bytes(message: Bundled) -> int:
    return len(message.answer or b"") if type(message) is GlimpseAnswer else 0


def _together(messages: Sequence[Bundled], node: int) -> Glimpses:
    return Glimpses(
        messages[0].epoch,
        node,
        tuple((m.resource, m.serial) for m in messages if type(m) is AskGlimpse),
        tuple((m.resource, m.asker, m.serial) for m in messages if type(m) is Probe),
        tuple((m.resource, m.serial, m.answer) for m in messages if type(m) is GlimpseAnswer),
    )
