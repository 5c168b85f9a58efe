"""The official JSON Schema test suite, draft by draft: verdicts of the exact mode, and what is refused.

    pip download --no-deps --no-binary :all: jsonschema && tar xzf jsonschema-*.tar.gz
    python benchmarks/json_schema_suite.py jsonschema-*/json

Required cases are all but those under `optional`. Each instance is written in two ways. A contradictory schema refuses
all; other schemas that do not compile are listed with their error. Known formats are enforced where the suite of draft
2020-12 calls them annotations: those cases count as wrongly rejected.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ramet.errors import GrammarError
from ramet.grammar import CompiledGrammar, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema

DIALECTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256], [256])


def groups(folder: Path, draft: str, *, optional: bool) -> Iterator[tuple[str, Any]]:
    for file in sorted((folder / "tests" / draft).rglob("*.json")):
        if ("optional" in file.parts) == optional:
            for group in json.loads(file.read_text()):
                yield f"{file.name}: {group['description']}", group


def accepts(grammar: CompiledGrammar | None, value: Any) -> set[bool]:
    """The verdicts on both ways to write a value; a contradictory schema (None) refuses all."""
    found = set()
    for text in (json.dumps(value), json.dumps(value, separators=(",", ":"))):
        state = None if grammar is None else grammar.advance_bytes(0, text.encode())
        found.add(state is not None and grammar is not None and grammar.is_accepting(state))
    return found


def run(folder: Path, draft: str, options: JsonOptions, *, optional: bool) -> None:
    right = total = 0
    wrong: dict[bool, list[str]] = {True: [], False: []}
    refused: list[str] = []
    for name, group in groups(folder, draft, optional=optional):
        schema, tests = group["schema"], group["tests"]
        total += len(tests)
        if isinstance(schema, dict):
            schema = {"$schema": DIALECTS[draft], **schema}
        grammar: CompiledGrammar | None = None
        try:
            grammar = compile_grammar(JsonSchema(schema, options), BYTES)
        except GrammarError as error:
            if "contradictory" not in str(error):
                refused.append(f"{len(tests)} cases, {name}: {type(error).__name__}: {error}")
                continue
        for test in tests:
            try:
                is_right = accepts(grammar, test["data"]) == {test["valid"]}
            except GrammarError as error:  # of a part that is compiled when a text first gets there
                refused.append(f"1 case, {name}: {type(error).__name__}: {error}")
                continue
            if is_right:
                right += 1
            else:
                wrong[test["valid"]].append(f"{name}: {test['description']}")
    kind = "optional" if optional else "required"
    print(f"{draft}, {kind}: {right} of {total} right ({right / total:.1%}), {len(wrong[False])} wrongly accepted, "
          f"{len(wrong[True])} wrongly rejected, {len(refused)} refused")  # fmt: skip
    for title, names in (("wrongly accepted", wrong[False]), ("wrongly rejected", wrong[True]), ("refused", refused)):
        for line in names:
            print(f"    {title}: {line[:240]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the suite: a folder with `tests` and `remotes`")
    parser.add_argument("--draft", choices=DIALECTS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--optional", action="store_true", help="the optional cases as well")
    arguments = parser.parse_args()
    remotes = arguments.folder / "remotes"
    registry = {
        f"http://localhost:1234/{file.relative_to(remotes).as_posix()}": json.loads(file.read_text())
        for file in remotes.rglob("*.json")
    }
    options = JsonOptions("any", registry=registry)
    for draft in arguments.draft or DIALECTS:
        for optional in (False, True) if arguments.optional else (False,):
            run(arguments.folder, draft, options, optional=optional)


if __name__ == "__main__":
    main()
