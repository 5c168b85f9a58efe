"""Repair: broken JSON from elsewhere becomes valid JSON of a known form; only then is it loaded."""

import json

from ramet import State, function, gen

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
EXAMPLE = {"broken": "{name: 'Kite', tags: ['toy' 'wind',}"}
SCRIPT = {"Repaired:": '{"name": "Kite", "tags": ["toy", "wind"]}'}


@function(temperature=0)
def repair(s: State, broken: str) -> None:
    s += f"Broken JSON: {broken}\nRepaired: " + gen("fixed", SCHEMA, max_tokens=200)


def main() -> None:
    state = repair.run(**EXAMPLE)
    print(json.dumps(state["fixed"]))


if __name__ == "__main__":
    main()
