"""The values of the named parts of a text that a composed grammar described."""

from __future__ import annotations

from typing import Any

from ramet import grammar
from ramet.lang.graph.ir import parse_value


def captured_values(source: str, text: str) -> dict[str, Any]:  # Any: JSON
    """Return name -> value of the parts in a text of a composed grammar; a list of values if a part may come again.

    A name that is not in the text has the value None, or no values. Takes long for a long text.

    Raises: ValueError if the text is not one of the grammar: it was cut off.
    """
    reader = grammar.capture_reader(source)
    found: dict[str, Any] = {name: [] if form.is_list else None for name, form in reader.captures.items()}
    for part in reader.read(text):
        form = reader.captures[part.name]
        value = parse_value(form.type, text[part.begin : part.end])
        if form.is_list:
            found[part.name].append(value)
        else:
            found[part.name] = value
    return found
