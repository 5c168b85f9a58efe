"""Whatever a model's template does, it ends soon, in little memory, and with a typed error."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import BrokenModelFile, InvalidRequest
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.template_limits import MAX_SIZE

MESSAGES = [{"role": "user", "content": "Hi"}]
COSTLY = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(90000) if i > 10**6 %}{% endfor %}" * 50,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | center(width=10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%999999999s' | format('x') }}",
    "{{ '{:>999999999}'.format('x') }}",
    "{{ '{:>{w}}'.format('x', w=10**9) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 9 ** 99999 ** 9 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x | join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'x' * 2000 }}{% endfor %}",
]


@pytest.mark.parametrize("source", COSTLY, ids=range(len(COSTLY)))
def test_a_template_that_would_not_end_is_given_up(source: str) -> None:
    template = ChatTemplate(source)
    tracemalloc.start()
    start_s = time.monotonic()
    try:
        with pytest.raises(InvalidRequest, match="chat template"):
            template.render(MESSAGES, add_generation_prompt=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400 << 20, f"{peak:,} bytes"
    assert time.monotonic() - start_s < 60


NESTED = [
    "{% for i in [1] %}" * 40 + "x" + "{% endfor %}" * 40,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ 1" + " + 1" * 10_000 + " }}",
    "x" * (2 << 20),
    "{% macro f() %}{{ caller( }}",
    "{{ 'a' | nosuchfilter }}",
    "{% extends 'other' %}",
    "{% include 'other' %}",
    "\x00{{",
]


@pytest.mark.parametrize("source", NESTED, ids=range(len(NESTED)))
def test_a_template_that_cannot_be_compiled_or_run_is_a_typed_error(source: str) -> None:
    with pytest.raises((BrokenModelFile, InvalidRequest)):
        ChatTemplate(source).render(MESSAGES, add_generation_prompt=True)


def test_what_templates_do_every_day_still_works() -> None:
    source = (
        "{%- for message in messages -%}{%- if loop.last -%}[{{ loop.index }}/{{ loop.length }}]{%- endif -%}"
        "{{ message.role ~ ': ' ~ (message.content | trim) }}\n{%- else -%}none{%- endfor -%}"
        "{% for key, value in {'a': 1, 'b': 2} | dictsort %}{{ key }}={{ value }};{% endfor %}"
        "{% set items = [1, 2, 3] %}{{ items | map('string') | join(',') }}{{ items[::-1] | list }}"
        "{% for item in items if item > 1 %}{{ item }}{% break %}{% endfor %}{{ '%02d' | format(7) }}{{ 'x' * 3 }}"
        "{{ 'a,b'.split(',')[-1] }}{{ {'k': [1]} | tojson(indent=2) }}{{ 'text'.replace('t', 'T') }}"
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('y') }}{% for c in 'ab' %}{{ c }}{% endfor %}{{ 2 ** 10 % 7 }}"
    )
    text = ChatTemplate(source).render([{"role": "user", "content": " Hi "}], add_generation_prompt=False)
    assert text == '[1/1]user: Hia=1;b=2;1,2,3[3, 2, 1]207xxxb{\n  "k": [\n    1\n  ]\n}TexT<y>ab2'


PIECES = (
    *("{% for i in range(99999) %}", "{% endfor %}", "{{ i }}", "{{ 'a' * 99999 }}", "{% set x = x ~ x ~ 'ab' %}"),
    *("{{ x }}", "{% if x %}", "{% endif %}", "{{ x | center(99999) }}", "{{ messages | tojson }}", "{{ f() }}"),
    *("{% macro f() %}", "{% endmacro %}", "{{ 9 ** 999 }}", "{{ x.format(x) }}", "text", "{{", "}}", "{%", "%}"),
    "{{ [x, x] | join(x) }}",
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_template_ends_with_a_text_or_a_typed_error(source: str) -> None:
    try:
        text = ChatTemplate(source).render(MESSAGES, add_generation_prompt=False)
    except (BrokenModelFile, InvalidRequest):
        return
    assert len(text) <= MAX_SIZE
