"""What a JSON schema costs per token, and whether what comes out is valid: SmolLM2-135M-Instruct on this machine.

    python benchmarks/bench_constrained.py                 tok/s with the workloads' schema over tok/s without
    python benchmarks/bench_constrained.py --tokens        tokens and steps that answers take, over the tokenizer's own
    python benchmarks/bench_constrained.py --validate 200  random schemas at temperature 1, all outputs validated

Both rows of a ratio are measured in turns in one run. Prompts are 128 made-up tokens, outputs 128, end of text ignored.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jsonschema
import torch
from json_line import commit, print_record
from workloads import JSON_SCHEMA, json_workload

from ramet.grammar import Vocabulary
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.engine.engine import Engine
from ramet.runtime.types import FinishReason, Grammar, SamplingParams

Json = Any  # a decoded JSON document


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "job": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 30},
        "member": {"type": "boolean"},
        "joined": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
        "role": {"enum": ["admin", "user", "guest", "operator"]},
    },
    "additionalProperties": False,
}
TOKEN_SCHEMAS = {
    "seven fields": {**PERSON, "required": [*PERSON["properties"]]},
    "optional fields": {**PERSON, "required": ["name"]},
    "workload": {**JSON_SCHEMA, "minItems": 3, "maxItems": 3},
}
NOTES = (
    "Ann Miller, 41, is an engineer from Rome. She joined on 3 May 2021 and is a member.",
    "Bob, a baker aged 29, lives in Oslo since 2019; joined 2020-11-02, no member.",
    "Dr. Chen Wei (58) teaches physics in Taipei, admin since 2015.",
    "Zoë Müller-Lüdenscheidt, 33, guest, paints in Zürich.",
)


def tokens_taken(engine: Engine, vocabulary: Vocabulary, batches: list[int], max_tokens: int) -> list[dict[str, Json]]:
    """Tokens and steps of answers about NOTES, greedy and drawn, with either tokenization of forced text.

    own_split: of the same texts, by the tokenizer. steps_decoding: with forced tokens decoded one by one.
    """
    rows = []
    for name, schema in TOKEN_SCHEMAS.items():
        for tokenization, words in (("canonical", vocabulary), ("any", vocabulary.without_splits)):
            grammar = compile_constraint("json_schema", json.dumps(schema), words, **AS_MODELS_WRITE)
            for batch in batches:
                taken = own = 0
                engine.flush_cache()
                before = engine.stats()["num_steps"]
                requests = [(note, i) for i in range(2) for note in NOTES]
                for begin in range(0, len(requests), batch):
                    handles = [
                        engine.submit(
                            note + "\nAs JSON:\n",
                            SamplingParams(temperature=float(i), max_tokens=max_tokens, seed=i),
                            grammar=grammar,
                        )
                        for note, i in requests[begin : begin + batch]
                    ]
                    for handle in handles:
                        result = handle.result()
                        taken += len([t for t in result.token_ids if t not in engine.tokenizer.eos_ids])
                        own += len(engine.tokenizer.encode(result.text, continues=True))
                rows.append(
                    {
                        "schema": name,
                        "tokenization": tokenization,
                        "batch": batch,
                        "tokens": taken,
                        "own_split": own,
                        "ratio": round(taken / own, 4),
                        "steps": engine.stats()["num_steps"] - before,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def tokens_per_s(engine: Engine, batch: int, seed: int, grammar: Grammar | None) -> float:
    """Generated tokens a second of one batch, prefill included, from an empty cache."""
    engine.flush_cache()
    chains = json_workload(batch, seed=seed, high=engine.model.config.vocab_size - 1000).chains
    sampling = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    start_s = time.perf_counter()
    handles = [engine.submit(chain[0].new, sampling, grammar=grammar, detokenize=False) for chain in chains]
    total = sum(len(handle.result().token_ids) for handle in handles)
    return total / (time.perf_counter() - start_s)


def measure(engine: Engine, vocabulary: Vocabulary, batches: list[int], repeats: int) -> list[dict[str, Json]]:
    grammars = {
        mode: compile_constraint("json_schema", json.dumps(JSON_SCHEMA), vocabulary, **options)
        for mode, options in (("exact", {}), ("as models write", AS_MODELS_WRITE))
    }
    rows = []
    for batch in batches:
        free: list[float] = []
        bound: dict[str, list[float]] = {mode: [] for mode in grammars}
        tokens_per_s(engine, batch, 99, None)  # warm-up
        for seed in range(repeats):
            free.append(tokens_per_s(engine, batch, seed, None))
            for mode, grammar in grammars.items():
                bound[mode].append(tokens_per_s(engine, batch, seed, grammar))
        for mode, values in bound.items():
            ratios = [a / b for a, b in zip(values, free, strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "mode": mode,
                    "free_tok_s": round(statistics.median(free), 1),
                    "constrained_tok_s": round(statistics.median(values), 1),
                    "ratio": round(statistics.median(ratios), 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


FORMATS = [
    *("date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uri-reference", "uuid"),
    *("json-pointer", "relative-json-pointer", "uri-template", "regex", "idn-hostname", "idn-email", "iri"),
]


def random_schema(rng: random.Random, depth: int = 0) -> Json:
    """A schema as people write them: typed, with limits, sometimes nested, sometimes a choice."""
    simple = ["string", "integer", "number", "boolean", "null", "enum", "pattern", "format"]
    kind = rng.choice(
        simple if depth >= 3 else [*simple, "object", "object", "object", "array", "array", "anyOf", "ref"]
    )
    if depth == 0:
        kind = "object"
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 30)}
    if kind == "integer":
        low = rng.randrange(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(5000)}
    if kind == "number":
        return {"type": "number", "minimum": rng.randrange(-5, 5), "exclusiveMaximum": rng.randrange(6, 1000)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 7, -1.5, True, None, 'with "quotes"', "é"], rng.randrange(1, 5))}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": rng.choice(["^[A-Z]{2}-[0-9]{3,5}$", "^(a|b)+c?$", "[0-9]", "^\\w+@\\w+$"]),
        }
    if kind == "format":
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind == "array":
        low = rng.randrange(3)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(1, 4)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    names = rng.sample(["id", "name", "größe", "tags", "a b", "when", "value", "items"], rng.randrange(1, 5))
    properties = {name: random_schema(rng, depth + 1) for name in names}
    schema: Json = {"type": "object", "properties": properties, "required": names[: rng.randrange(len(names) + 1)]}
    schema["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
    if kind == "ref":
        return {"$ref": "#/$defs/node"} if depth else schema
    if depth == 0:
        fields = {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}
        node = {"type": "object", "properties": fields, "required": ["n"], "additionalProperties": False}
        schema["$defs"] = {"node": node}
    return schema


def validate(engine: Engine, vocabulary: Vocabulary, first: int, count: int, max_tokens: int) -> dict[str, Json]:
    """Generate under `count` random schemas; every finished text must be valid. Failures are printed and counted."""
    # the schemas name no draft, so the newest one's checker: FormatChecker() alone means draft 3 where it says "time"
    draft = jsonschema.Draft202012Validator
    handles = []
    for seed in range(first, first + count):
        schema = random_schema(random.Random(seed))
        grammar = compile_constraint("json_schema", json.dumps(schema), vocabulary)
        prompt = engine.tokenizer.encode("Write one JSON object: ")
        sampling = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed)
        fits = len(grammar.shortest_completion(0)) <= max_tokens
        handles.append((seed, schema, fits, engine.submit(prompt, sampling, grammar=grammar)))
    valid = cut = invalid = 0
    for seed, schema, fits, handle in handles:
        result = handle.result()
        try:
            value = json.loads(result.text)
            jsonschema.validate(value, schema, cls=draft, format_checker=draft.FORMAT_CHECKER)
            valid += 1
        except (ValueError, jsonschema.ValidationError) as error:
            if result.finish_reason is FinishReason.LENGTH and not fits:
                cut += 1  # no valid text is short enough
                continue
            invalid += 1
            print(f"seed {seed}: {result.text!r} is not valid under {json.dumps(schema)}: {str(error).splitlines()[0]}")
    return {
        "first_seed": first,
        "schemas": count,
        "max_tokens": max_tokens,
        "valid": valid,
        "cannot_fit": cut,
        "invalid": invalid,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--validate", type=int, default=0)
    parser.add_argument("--first-seed", type=int, default=0, help="of the random schemas")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with Engine(args.model, num_kv_tokens=32_768) as engine:
        tokenizer = engine.tokenizer
        vocabulary = Vocabulary(
            tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
        )
        figures: dict[str, Json] = {}
        if args.tokens:
            figures["rows"] = tokens_taken(
                engine, vocabulary, [int(b) for b in args.batches.split(",")], args.max_tokens
            )
        elif args.validate:
            figures["validity"] = validate(engine, vocabulary, args.first_seed, args.validate, args.max_tokens)
            print(figures["validity"])
        else:
            figures["rows"] = measure(engine, vocabulary, [int(b) for b in args.batches.split(",")], args.repeats)
    print_record(
        {
            "benchmark": "constrained",
            "commit": commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            **figures,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
