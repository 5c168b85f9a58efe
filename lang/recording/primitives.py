"""`gen`, `select` and the roles, which a program appends to its state. They return descriptions; nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args, overload

import msgspec

from ramet.errors import InvalidRequest
from ramet.lang.graph.checks import Check, check_problem
from ramet.lang.graph.constraint import Tokenization
from ramet.lang.graph.ir import DEFAULT_SCORER, MAX_RETRIES, SCORERS, Constraint, is_json
from ramet.lang.graph.json_form import AS_CONFIGURED, AdditionalProperties, Order, Whitespace, json_form
from ramet.lang.graph.sampling import FIELDS, to_sampling
from ramet.lang.recording.composition import Composition, Part, composed_gen, holds_description
from ramet.lang.recording.generations import Gen, SelectExpr
from ramet.lang.recording.recorder import Appendable, Chain
from ramet.lang.running.output_types import TEXT, Form, choice, json_schema, output_type
from ramet.lang.running.values import V, Value, plain

THINKING_TOKENS = 1024
_MODEL = "the name of one of the run's backends"


def gen(
    name: str | None = None,
    type: type[V] | Form | Composition | None = None,
    *,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    string_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool | None = None,
    logprobs: int | None = None,
    regex: str | None = None,
    cfg: str | None = None,
    choices: Sequence[str] | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    substring_of: str | None = None,
    tokenization: Tokenization = "canonical",
    whitespace: Whitespace | None = None,
    order: Order | None = None,
    additional_properties: AdditionalProperties | None = None,
    where: Check | Callable[[Any], object] | Sequence[Check | Callable[[Any], object]] = (),
    retries: int = 3,
    thinking: bool | int = False,
    draft: str = "",
    adapter: str = "",
    model: str = "",
) -> Gen[V]:
    """Generate text, or a value of `type`, and keep it as variable `name`.

    Text before it may end with a space or half a word: the model writes the last token of that text again, as a part of
    any token that begins with it. A constrained value ends where the model goes on with the text that follows.

    `type`: str, int, float, bool, Literal, Enum, datetime, date, a dataclass, TypedDict or pydantic model, `list[...]`,
    or a JSON schema dict; or a grammar (`one_or_more(...)`, `select([...])`, ...), whose named parts become variables,
    too. At most one of `regex`, `cfg` (a Lark grammar), `choices`, `json_schema` and `substring_of` constrains the text
    (instead of the constraint of `type`).

    `temperature`: 0 for one of several texts (`choices`, a Literal, an Enum, bool), 1 for any other value.
    `tokenization`: of text that the constraint forces, such as a key. `canonical`: the tokenizer's own tokens (see
    docs/grammar.md). `any`: any tokens that spell it.
    `whitespace`, `order`, `additional_properties`: how JSON is written (lang/graph/json_form.py); by default as models
    write it: `{"name": "Ann", "tags": ["a", "b"]}`, properties in declared order, and no others than the declared ones.

    `string_tokens`: the most tokens of each string in a JSON value. A longer one is ended, so that a text that repeats
    itself leaves room for the other fields; `s.meta(name)["incomplete"]` names the fields.

    `where`: checks of the value: `length`, `between`, `is_in`, `starts_with`, `ends_with`, `contains`, combined by `&`,
    `|` and `~`, or any callable, which refuses a value by returning something false or raising ValueError. Checks of
    texts, numbers and JSON become a part of the constraint: the model can't write a value that fails. A value that
    fails another check, or was cut off, is generated again, up to `retries` times; then CheckFailed is raised. The
    refused texts are in `s.meta(name)["attempts"]`. A callable needs the value in Python, so the program waits for it.
    `explain()` says which checks are masks.

    `thinking`: the model thinks before it writes the value: free text of at most this many tokens (True: 1,024) between
    the marks of its chat template. Only the value after it is constrained. `s.meta(name)["thinking"]` has the text.

    `draft`: text that the value is expected to be like, such as a file that it changes a little. The value is the same
    with any draft; where the engine verifies drafts (`speculative`), it comes sooner.

    `adapter`: the adapter (LoRA) of the engine that writes the value; without one, that of the run's option `adapter`.

    `model`: the name of the model that writes it, in a run with several: `backend={"small": ..., "big": ...}`. Without
    one, the first of them.

    Raises:
        InvalidRequest: a value outside its range, or constraints that exclude each other.
    """
    # A generated value can be a part of a constraint; it must be read first.
    regex, cfg, choices, json_schema, substring_of = plain((regex, cfg, choices, json_schema, substring_of))
    retries, thinking, draft, adapter, model = plain((retries, thinking, draft, adapter, model))
    if isinstance(json_schema, str):
        try:
            json_schema = msgspec.json.decode(json_schema, type=dict)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"json_schema is text, but is no JSON object: {error}", param="json_schema") from error
    if json_schema is not None and not isinstance(json_schema, Mapping):
        raise InvalidRequest(
            f"json_schema is {json_schema!r}, but must be a dict or its JSON text", param="json_schema"
        )
    is_composed = isinstance(type, Composition)
    wanted = TEXT if is_composed else output_type(json_schema if type is None and json_schema is not None else type)
    constraint = _constraint(wanted.constraint, regex, cfg, choices, json_schema, substring_of)
    if tokenization not in get_args(Tokenization):
        raise InvalidRequest(f"tokenization is {tokenization!r}, but must be canonical or any", param="tokenization")
    if tokenization != "canonical" and not is_composed:
        if constraint is None:
            raise InvalidRequest("tokenization is of a constraint, but the text is free", param="tokenization")
        constraint = msgspec.structs.replace(constraint, tokenization=tokenization)
    if string_tokens is not None and not is_composed and (constraint is None or constraint.kind != "json_schema"):
        raise InvalidRequest("string_tokens is of strings in JSON, but the value is none", param="string_tokens")
    form = json_form(whitespace=whitespace, order=order, additional_properties=additional_properties)
    if form != AS_CONFIGURED and not is_composed:
        if constraint is None:
            raise InvalidRequest(f"{next(iter(form.said()))} is of JSON, but the text is free", param="type")
        constraint = msgspec.structs.replace(constraint, form=form)
    values = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "string_tokens": string_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "repetition_penalty": repetition_penalty,
        "logit_bias": logit_bias,
        "seed": seed,
        "stop": stop,
        "stop_regex": stop_regex,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
    }
    checks = tuple(where) if isinstance(where, Sequence) else (where,)
    for check in checks:
        if not (isinstance(check, Check) or callable(check)):
            raise InvalidRequest(f"where has {check!r}, but must have checks such as length(1, 20)", param="where")
        problem = check_problem(check) if isinstance(check, Check) else None
        if problem is not None:
            raise InvalidRequest(problem, param="where")
    if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= MAX_RETRIES:
        raise InvalidRequest(f"retries is {retries!r}, but must be in [0, {MAX_RETRIES:,}]", param="retries")
    if not isinstance(thinking, bool | int) or thinking < 0:
        raise InvalidRequest(f"thinking is {thinking!r}, but must be True or a number of tokens", param="thinking")
    _check_text("draft", draft, "text that UTF-8 can write")
    _check_text("adapter", adapter, "the name of an adapter")
    _check_text("model", model, _MODEL)
    budget = THINKING_TOKENS if thinking is True else thinking or None
    said = {name: plain(value) for name, value in values.items() if value is not None}
    if isinstance(type, Composition):
        if constraint is not None or checks:
            raise InvalidRequest("constraints and checks of a grammar stand in its parts", param="type")
        made = composed_gen(name, type, to_sampling(said), tokenization, form, budget)
    else:
        made = Gen(name, wanted, constraint, to_sampling(said), checks, retries, budget)
    return replace(made, draft=draft, adapter=adapter, model=model)


def _check_text(name: str, value: object, what: str) -> None:
    if not isinstance(value, str) or not is_json(value):
        raise InvalidRequest(f"{name} is {value!r}, but must be {what}", param=name)


@overload
def select(
    name: str | None,
    choices: Sequence[str | Value],
    *,
    scorer: str = DEFAULT_SCORER,
    temperature: float = 0.0,
    seed: int | None = None,
    return_probs: bool = False,
    model: str = "",
) -> SelectExpr: ...
@overload
def select(
    name: str | Sequence[Part] | None = None,
    choices: Sequence[Part] = (),
    *,
    scorer: str = DEFAULT_SCORER,
    temperature: float = 0.0,
    seed: int | None = None,
    return_probs: bool = False,
    model: str = "",
) -> SelectExpr | Composition: ...
def select(
    name: str | Sequence[Part] | None = None,
    choices: Sequence[Part] = (),
    *,
    scorer: str = DEFAULT_SCORER,
    temperature: float = 0.0,
    seed: int | None = None,
    return_probs: bool = False,
    model: str = "",
) -> SelectExpr | Composition:
    """Append the likeliest of `choices` and keep it as variable `name`. `s.meta(name)["probs"]` sums to one.

    `return_probs`: the value gets an attribute `probs`, a dict of choice -> probability: `s[name].probs`.
    `model`: as in `gen`.

    Scorers: `calibrated` (neither short nor common choices are preferred), `likelihood` (the model's exact
    probabilities; a choice that is the beginning of another one always beats it), `token_normalized`, `greedy`,
    `unconditional`. With `temperature` above 0 the choice is drawn from the probabilities.

    `select([...])` without a name, some of whose choices are descriptions (`gen(...)`, `one_or_more(...)`, functions),
    is a grammar: the model writes one of them, and the named parts in it become variables.
    """
    if name is not None and not isinstance(name, str):
        if choices:
            raise InvalidRequest(f"a variable is named {name!r}, but must be named by a text", param="name")
        choices, name = name, None
    if choices is None or isinstance(choices, str) or not (choices := tuple(choices)):
        raise InvalidRequest(f"select needs a list of choices, not {choices!r}", param="choices")
    FIELDS["temperature"].check(temperature)
    if seed is not None:
        FIELDS["seed"].check(seed)
    if scorer not in SCORERS:
        raise InvalidRequest(f"scorer is {scorer!r}, but must be one of {', '.join(SCORERS)}", param="scorer")
    model = plain(model)
    _check_text("model", model, _MODEL)
    texts = tuple(one for one in choices if isinstance(one, str | Value) and not holds_description(one))
    if len(texts) == len(choices):
        return SelectExpr(name, texts, scorer, temperature, seed, return_probs, model)
    wrong = next(
        (one for one in choices if isinstance(one, int | float | bytes | None) and not isinstance(one, Value)), None
    )
    if wrong is not None:
        raise InvalidRequest(
            f"a choice is {wrong!r}, but must be text, a generated value or a description", param="choices"
        )
    said = (name, scorer, temperature, seed, return_probs, model)
    if said != (None, DEFAULT_SCORER, 0.0, None, False, ""):
        raise InvalidRequest(
            "a selection among descriptions is a grammar, which has no name, scorer or temperature of its own; write "
            "gen(name, select([...]), temperature=...)",
            param="choices",
        )
    return Composition("select", choices)


def system(*content: Appendable) -> Chain:
    """Return a system message."""
    return _message("system", content)


def user(*content: Appendable) -> Chain:
    """Return a user message."""
    return _message("user", content)


def assistant(*content: Appendable) -> Chain:
    """Return an assistant message, which usually contains a `gen`."""
    return _message("assistant", content)


def _message(role: str, content: tuple[Appendable, ...]) -> Chain:
    if not content:
        raise InvalidRequest(f'{role}() has no content; for a message without text, write {role}("")', param="content")
    return Chain(content, role)


def _constraint(
    by_type: Constraint | None,
    regex: str | None,
    cfg: str | None,
    choices: Sequence[str] | None,
    schema: Mapping[str, Any] | None,
    text: str | None,
) -> Constraint | None:
    given: dict[str, Constraint] = {}
    if regex is not None:
        given["regex"] = Constraint("regex", regex)
    if cfg is not None:
        given["cfg"] = Constraint("cfg", cfg)
    if choices is not None:
        if not choices or isinstance(choices, str) or not all(isinstance(c, str) and c for c in choices):
            raise InvalidRequest(f"choices must be a list of non-empty texts, not {choices!r}", param="choices")
        given["choices"] = choice(list(choices))
    if schema is not None:
        given["json_schema"] = json_schema(schema)
    if text is not None:
        given["substring_of"] = Constraint("substring", text)
    if len(given) > 1:
        raise InvalidRequest(f"give one of {' and '.join(given)}, not {len(given)}", param=next(iter(given)))
    return next(iter(given.values()), by_type)
