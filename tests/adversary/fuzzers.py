"""Fuzzers of everything that reads what strangers write: grammars, graphs, model files, HTTP.

    python tests/adversary/fuzzers.py regex --seconds 300     coverage-guided, with atheris
    python tests/adversary/fuzzers.py gguf FILE               one input again

A target reads bytes. It may refuse them with the error that its module documents; any other exception is a finding, and
so is an input that takes longer than a few seconds. A finding ends the run; its input is written beside the corpus.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOW_S = 20  # of one input; limits of grammars are far below

Check = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Target:
    """make: returns the function that reads an input; modules are imported there, so that they can be instrumented.

    seeds: inputs that are read without an error, and others. words: what mutations put in.
    """

    make: Callable[[Path], Check]
    seeds: Sequence[bytes]
    words: Sequence[str] = ()
    max_bytes: int = 400


def make_regex(folder: Path) -> Check:
    return _constraint("regex", lambda data: data.decode("utf-8", "replace"))


def make_gbnf(folder: Path) -> Check:
    from ramet.errors import GrammarError
    from ramet.grammar.text.gbnf import lark_of_gbnf

    check = _constraint("cfg", lambda data: data.decode("utf-8", "replace"))

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        try:
            lark = lark_of_gbnf(text)
        except GrammarError:
            return
        check(lark.encode("utf-8", "surrogatepass"))

    return read


def make_lark(folder: Path) -> Check:
    return _constraint("cfg", lambda data: data.decode("utf-8", "replace"))


def make_json_schema(folder: Path) -> Check:
    return _constraint("json_schema", lambda data: data.decode("utf-8", "replace"))


def _constraint(kind: str, decode: Callable[[bytes], str]) -> Check:
    """Compile a constraint, then write a text with it: what it allows first, and the shortest way to its end."""
    from ramet.errors import GrammarError
    from ramet.grammar import Vocabulary, compile_constraint
    from ramet.grammar.machine.automaton import Limits

    words = Vocabulary([*(bytes((i,)) for i in range(256)), b"ab", b'":', b"<eos>"], [258], [258])
    limits = Limits(max_time_s=1.0, max_states=20_000, max_regular_states=2_000)

    def read(data: bytes) -> None:
        try:
            grammar = compile_constraint(kind, decode(data), words, limits=limits)
            state: int | None = 0
            for step in range(8):
                assert state is not None
                allowed = [i for i, bit in enumerate(_bits(grammar.mask(state))) if bit and i < 258]
                rest = grammar.shortest_completion(state)
                assert allowed or grammar.is_accepting(state), "a state that nothing can follow and nothing ends"
                assert len(rest) <= grammar.completion_bound(state)
                if not allowed:
                    break
                state = grammar.advance(state, allowed[(step * 7) % len(allowed)])
            assert state is not None, "an allowed token is refused"
            for token in grammar.shortest_completion(state):
                state = grammar.advance(state, token)
                assert state is not None, "the shortest completion is refused"
            assert grammar.is_accepting(state)
        except GrammarError:
            return

    return read


def _bits(mask: Any) -> Any:  # Any: an int32 array
    import numpy as np

    return np.unpackbits(np.asarray(mask, dtype="<i4").view(np.uint8), bitorder="little")


def make_ir(folder: Path) -> Check:
    from ramet.errors import InvalidProgram
    from ramet.lang.graph.ir import Graph

    def read(data: bytes) -> None:
        try:
            graph = Graph.from_json(data)
        except InvalidProgram:
            return
        again = Graph.from_json(graph.to_json())
        assert again == graph, "a graph is not what its JSON says"

    return read


def make_gguf(folder: Path) -> Check:
    from ramet.errors import ModelError
    from ramet.runtime.models.gguf_file import GgufFile

    def read(data: bytes) -> None:
        path = folder / "model.gguf"
        path.write_bytes(data)
        try:
            file = GgufFile(path)
            for entry in file.tensors.values():
                assert entry.stored.nbytes <= len(data)
        except ModelError:
            return

    return read


def make_safetensors(folder: Path) -> Check:
    from ramet.errors import ModelError
    from ramet.runtime.models.loader_safetensors import load_safetensors
    from ramet.runtime.testing.dummy import tiny_model

    config = tiny_model().config

    def read(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        try:
            weights = load_safetensors(folder, config)
            for name in weights:
                weights[name]
        except ModelError:
            return

    return read


def make_bodies(folder: Path) -> Check:
    """The first byte says which body it is."""
    from ramet.errors import RametError
    from ramet.runtime.server.anthropic.bodies import MessagesBody
    from ramet.runtime.server.errors import HttpError
    from ramet.runtime.server.native.bodies import AbortBody, GenerateBody
    from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody
    from ramet.runtime.server.programs.routes import PartBody, ProgramBody
    from ramet.runtime.server.responses.bodies import ResponsesBody
    from ramet.runtime.server.validation import Strict, parsed

    models: list[type[Strict]] = [
        GenerateBody, ChatBody, CompletionBody, MessagesBody, AbortBody, ProgramBody, PartBody, ResponsesBody,
    ]  # fmt: skip

    def read(data: bytes) -> None:
        if not data:
            return
        try:
            body = parsed(models[data[0] % len(models)], data[1:], 10_000)
        except HttpError as error:
            if not 400 <= error.status < 500:
                raise
            return
        sampling = getattr(body, "sampling", None)
        if callable(sampling):
            try:
                sampling()
            except (HttpError, RametError):
                return

    return read


def _gguf(keys: Sequence[tuple[str, int, bytes]], tensors: Sequence[tuple[str, tuple[int, ...], int, int]]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, kind, value in keys:
        data += text(name) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return data + bytes(-len(data) % 32) + bytes(64)


def _safetensors(head: object) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


_KEYWORDS = """type properties items not allOf anyOf oneOf enum const pattern multipleOf minimum maximum minLength
    patternProperties additionalProperties unevaluatedProperties dependentSchemas if then contains prefixItems
    propertyNames $defs uniqueItems minItems required maxLength exclusiveMinimum $dynamicRef"""
_ARRAY = struct.pack("<IQ", 8, 2) + 2 * (struct.pack("<Q", 1) + b"a")
_GRAPH = {
    "version": 1,
    "nodes": [
        {"kind": "argument", "id": 0, "name": "q"},
        {"kind": "text", "id": 1, "parts": ["Q: ", {"node": 0}]},
        {"kind": "generate", "id": 2, "parent": 1, "name": "x", "sampling": {"max_tokens": 4}},
    ],
    "arguments": {"q": "why"},
}
_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logit_bias": {"3": 1.5}, "n": 2}

TARGETS: dict[str, Target] = {
    "regex": Target(
        make_regex,
        [rb"[a-c]{2,5}(x|yz)*\d", rb"(?:(?!foo|bar).){0,20}", rb"^\w+(?<=ab)$", rb"(?i:\u00e9+?)[^\n-\x7f]", rb"a**"],
        ["(?:", "(?!", "(?=", "(?<=", "(?P<a>", "\\d", "\\p{L}", "[^", "{2,}", "*?", "\\x00", "|", "\\b", "$"],
        60,
    ),
    "gbnf": Target(
        make_gbnf,
        [b'root ::= "a" (b | [0-9]+)? # c\nb ::= root{1,3} "n"', b'root ::= [^"\\\\] | "\\u00e9"\n', b"root ::= root"],
        ["root", "::=", "[^", '"', "{2,}", "\\x41", "\n", "(", "|"],
        120,
    ),
    "lark": Target(
        make_lark,
        [
            b'start: e\ne: e "+" T | T\nT: /[0-9]+/\n%ignore " "',
            b'start: e\ne: e e | e "a" | "a"',
            b'start: a~2..3 [b]\na: "x"i\nb: "a".."f"\n%import common.INT',
        ],
        ["start", ":", "%ignore", "%import common.", "~1..3", "/a/", "->", "?", "|", "\n", "!", "{a}"],
        120,
    ),
    "json_schema": Target(
        make_json_schema,
        [
            b'{"type":"object","properties":{"a":{"type":"integer","minimum":1}},"required":["a"]}',
            b'{"$defs":{"t":{"type":"array","items":{"$ref":"#/$defs/t"}}},"$ref":"#/$defs/t"}',
            b'{"type":["string","null"],"pattern":"^a+$","maxLength":5,"not":{"const":"a"}}',
            b'{"anyOf":[{"multipleOf":0.5},{"enum":[1,"x",null]}],"uniqueItems":true,"minItems":2}',
        ],
        [
            *(f'"{word}":' for word in _KEYWORDS.split()),
            *("[", '{"', '"$ref":"#"', '"format":"date-time"', "1e400", "-0.0", "\\ud800"),
        ],
        300,
    ),
    "ir": Target(
        make_ir,
        [json.dumps(_GRAPH).encode(), b'{"version":1,"nodes":[{"kind":"fork","id":0,"group":0,"index":0,"width":1}]}'],
        ['"kind":"', "generate", "select", "join", "role", "tool_call", '"parent":', '"id":', '"options":[', '"node":'],
        600,
    ),
    "gguf": Target(
        make_gguf,
        [
            _gguf([("general.alignment", 4, struct.pack("<I", 32)), ("a", 9, _ARRAY)], [("t", (4, 2), 0, 0)]),
            _gguf([("b", 7, b"\x01"), ("n", 9, struct.pack("<IQIQ", 9, 1, 4, 0))], [("t", (32,), 8, 0)]),
        ],
        ["GGUF", "general.alignment", "\xff\xff\xff\xff", "\x00\x00\x00\x00\x00\x00\x00\x80"],
        512,
    ),
    "safetensors": Target(
        make_safetensors,
        [
            _safetensors({"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
            _safetensors({"__metadata__": {"a": "b"}, "x": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}),
        ],
        ['"dtype":"F8_E4M3"', '"shape":[', '"data_offsets":[', "18446744073709551615", "-1"],
        512,
    ),
    "bodies": Target(
        make_bodies,
        [
            b"\x00" + json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 3, "regex": "a+"}}).encode(),
            b"\x01" + json.dumps(_CHAT).encode(),
            b"\x02" + json.dumps({"prompt": [1, 2], "echo": True, "logprobs": 2, "stop": ["a"]}).encode(),
            b"\x05" + json.dumps({"graph": _GRAPH, "arguments": {}}).encode(),
            b"\x07" + json.dumps({"input": "a", "tools": [], "text": {"format": {"type": "text"}}}).encode(),
        ],
        ['"stream":true', '"tools":[', '"n":', '"response_format":', "null", "1e999", "\\ud800", '"messages":[', "NaN"],
        600,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("input", type=Path, nargs="?", help="a file to read once instead of fuzzing")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, help="folder of inputs to begin with and to add to")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.input is not None:
            target.make(folder)(arguments.input.read_bytes())
            return
        fuzz(arguments.target, folder, arguments.corpus or folder / "corpus", arguments.seconds)


def compiled_modules() -> list[str]:
    """Return the modules whose functions numba compiles from their bytecode, which must stay as it is."""
    import ramet

    root = Path(ramet.__file__).parent.resolve().parent
    files = (root / "grammar").rglob("*.py")
    return [
        ".".join(("ramet", *file.relative_to(root).with_suffix("").parts))
        for file in files
        if "ramet.loops" in file.read_text()
    ]


def fuzz(name: str, folder: Path, corpus: Path, seconds: int) -> None:
    """Run a target under atheris, which ends the process."""
    import atheris

    target = TARGETS[name]
    rooms = ["ramet.grammar", "ramet.lang.graph", "ramet.runtime.models", "ramet.runtime.server", "lark"]
    with atheris.instrument_imports(include=rooms, exclude=compiled_modules()):
        read = target.make(folder)
    for seed in target.seeds:
        read(seed)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = folder / "words"
    lines = ["".join(f"\\x{byte:02x}" for byte in word.encode("latin-1")) for word in target.words]
    words.write_text("".join(f'"{line}"\n' for line in lines))
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-dict={words}",
            f"-max_total_time={seconds}",
            f"-max_len={target.max_bytes}",
            f"-timeout={SLOW_S}",
            "-rss_limit_mb=4096",
            f"-artifact_prefix={Path.cwd() / name}-",
            "-print_final_stats=1",
        ],
        read,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
