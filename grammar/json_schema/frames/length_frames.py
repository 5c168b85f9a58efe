"""Frames of strings whose length and language are both limited: see lengths.py."""

from __future__ import annotations

import numpy as np

from ramet.grammar.json_schema.algebra.values import Strings
from ramet.grammar.json_schema.frames.frames import Context, Json, _Remembering, _Scalar, rest_of
from ramet.grammar.json_schema.frames.lengths import BoundedStrings, bounded_strings
from ramet.grammar.machine.automaton import DEAD, LOCAL_BITS, target


def bounded_string(json: Json, specs: tuple[tuple[Strings, ...], ...], context: Context) -> int | None:
    """Target at the start of a string; None where one table of all lengths will do."""
    known = json.bounded_strings
    if specs not in known:
        languages = json.expressions.languages
        known[specs] = bounded_strings(specs, languages)
    text = known[specs]
    if text is None:
        return None
    return _layers(json, text, 0, 0, context) if text.is_alive(0, 0) else DEAD


def _layers(json: Json, text: BoundedStrings, position: int, state: int, context: Context) -> int:
    """Target inside a string, `position` characters after its beginning."""
    kind = RememberingLayers if context.remembers else LayersFrame
    position = min(position, text.last)
    key = ("layers", id(text), position, context.number)
    return target(json.machine.intern(key, lambda: kind(json, text, position, context)), state)


class LayersFrame(_Scalar):
    """Some characters of a string; exits beyond `masks` go on with the next ones."""

    def __init__(self, json: Json, text: BoundedStrings, position: int, context: Context) -> None:
        self.json = json
        self.bounded = text
        self.position = position
        layers = self.layers = text.layers(position)
        tables = json.bounded_strings
        if layers not in tables:
            tables[layers] = json.string_frame(layers.rows, layers.num_exits)
        self.table = tables[layers]
        self.masks = layers.masks
        self.num_layers = layers.num_layers
        self.context = context
        self.key: tuple[object, ...] = ("layers", id(text), position, context.number)

    def mask_twin(self, local: int) -> int:
        return _layers(self.json, self.bounded, self.position, local, self.context.mask_twin())

    def following(self, exit_index: int) -> int:
        state = exit_index - len(self.masks)
        return _layers(self.json, self.bounded, self.position + self.num_layers, state, self.context)

    def resolve(self, exit_index: int) -> int:
        return super().resolve(exit_index) if exit_index < len(self.masks) else self.following(exit_index)

    def closing_exit(self, local: int) -> int:
        return self._closing(local)[1]

    def closing_way(self, exit_index: int, local: int) -> bytes:
        way, found = self._closing(local)
        assert found == exit_index
        return way

    def _closing(self, local: int) -> tuple[bytes, int]:
        """The shortest way to an end, as far as it leads through this table, and the exit that it takes."""
        costs = [rest_of(self.context, mask) for mask in self.masks]
        if self.table.num_exits > len(self.masks):
            # its quote and what follows are to be written then, too: else to go on would look cheaper than to end
            rest = 1 + min(self.context.rest(tag) for tag in self.bounded.tags)
            costs += (self.bounded.distances(self.position + self.num_layers).astype(np.int64) + rest).tolist()
        return self.layers.way_out(local, tuple(costs))


class RememberingLayers(_Remembering, LayersFrame):
    """Keeps its text over the parts."""

    def goes_on(self, exit_index: int) -> bool:
        return exit_index >= len(self.masks)

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        if not self.goes_on(exit_index):
            return super().resolve_text(exit_index, text)
        following = self.following(exit_index)
        frame = self.json.machine.frames[following >> LOCAL_BITS]
        return target(frame.remember(text), following & 0xFFFFFFFF)  # type: ignore[attr-defined]
