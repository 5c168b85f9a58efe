"""Grammars in Lark's own syntax -> IR. Lark reads the grammar, and this module walks its rules.

Understood: rules and terminals with all EBNF operators, `~n..m`, strings and regexps with flags, ranges, templates,
`%ignore`, `%override`, `%extend`, and all recursion, left recursion included. `%import` works for Lark's own grammars
(common, python, unicode, lark); other files are never read. Aliases, `?rule`, `!rule` and priorities are accepted and
have no effect, because they change trees and not languages.

There is no separate lexer. A text belongs to the language if some way to cut it into terminals fits the rules, as in
Lark's Earley parser. So if a keyword may touch a name, `ifx` is also read as `if x`; write the space into the rules if
it matters. A terminal with a lazy repeat ends at the first possible place. The regexp of a terminal sees only the
terminal: negative lookaheads see nothing after it, and positive lookaheads, `^` and `$` are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import lark
from lark.grammar import NonTerminal, Terminal
from lark.lexer import Pattern, PatternStr, Token
from lark.load_grammar import PrepareLiterals, TerminalTreeToPattern, load_grammar, nr_deepcopy_tree, stdlib_loader

from ramet.errors import GrammarTooLarge, InvalidGrammar, InvalidRegex
from ramet.grammar import ir
from ramet.grammar.regular import dfas
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular.utf8 import compile_text
from ramet.grammar.text.regex import parse_regex

MAX_COUNT = 10_000
MAX_RULES = 20_000
MAX_SIZE = 200_000

_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE, "l": re.LOCALE, "u": re.UNICODE}
_Template = tuple[tuple[str, ...], Any]  # parameters, Lark's tree (untyped in Lark)


def parse_cfg(
    source: str,
    *,
    start: str = "start",
    max_ignored: int | None = None,
    max_regular_states: int = dfas.MAX_STATES,
) -> ir.NamedRules:
    """Return the grammar that `source` describes in Lark's syntax. A regular grammar is one rule without references.

    max_ignored: how many characters `%ignore` allows in one place. Without a limit, a model may write white space
    forever.
    Raises: InvalidGrammar with the line of the error; GrammarTooLarge for counts above 10,000 or for templates that
    expand without end.
    """
    if not isinstance(source, str):
        raise InvalidGrammar(f"a grammar is a str, not {type(source).__name__}")
    if max_ignored is not None and not 0 <= max_ignored <= MAX_COUNT:
        raise InvalidGrammar(f"max_ignored is {max_ignored!r} but must be in [0, {MAX_COUNT:,}]")
    return _Reader(source, start, max_ignored, max_regular_states).read()


class _Reader:
    """Turns the definitions of one grammar into nodes."""

    def __init__(self, source: str, start: str, max_ignored: int | None, max_regular_states: int) -> None:
        self.source = source
        self.start = start
        self.max_ignored = max_ignored
        self.max_regular_states = max_regular_states
        self.rules: dict[str, ir.Node] = {}
        self.pending: list[tuple[str, Any, Mapping[str, ir.Node]]] = []  # rule, Lark's tree, values of the parameters
        self.terminals: dict[str, ir.Node] = {}
        self.argument_numbers: dict[ir.Node, int] = {}  # equal arguments of templates have equal numbers
        self.ignored: ir.Node = ir.EMPTY
        self.rule = ""

    def read(self) -> ir.NamedRules:
        definitions = self._load()
        self.templates: dict[str, _Template] = {n: (tuple(p), t) for n, p, t, _ in definitions.rule_defs}
        self.terminal_trees = {name: tree for name, (tree, _) in definitions.term_defs}
        if self.start not in self.templates:
            self.fail(f"there is no rule {self.start!r} to start from; rules are {', '.join(self.templates) or 'none'}")
        if definitions.ignore:
            options = tuple(self.terminal(name) for name in definitions.ignore)
            self.terminals.clear()
            any_number: ir.Node = ir.Repeat(ir.Choice(options))
            if self.max_ignored is not None:
                any_number = ir.Intersect((any_number, ir.Repeat(ir.ANY_CHAR, 0, self.max_ignored)))
            self.ignored = self._table(any_number, "%ignore")
        begin = ir.Concatenation((self.ignored, self.reference(self.start, ())))
        while self.pending:
            self.rule, tree, values = self.pending.pop()
            self.rules[self.rule] = self.node(tree, values)
        name = "the start"  # the blank makes sure that no rule in Lark has this name
        whole = ir.NamedRules({**self.rules, name: begin}, name)
        return ir.NamedRules.of(whole.inlined(begin)) if name in _regular_rules(whole.rules) else whole

    def _load(self) -> Any:
        try:
            return load_grammar(self.source, "<grammar>", [_only_larks_own], False)[0]
        except lark.UnexpectedInput as error:
            self.fail(_first_line(error), error.line, error.column, cause=error)
        except lark.exceptions.LarkError as error:
            self.fail_by_name(error)
        except (OSError, AssertionError, ValueError) as error:
            self.fail_by_name(error)

    # --- rules

    def node(self, tree: Any, values: Mapping[str, ir.Node]) -> ir.Node:
        """Return the node of a part of a rule. `tree` is a lark Tree, Token or Symbol."""
        if isinstance(tree, Terminal):
            return values[tree.name] if tree.name in values else self.terminal(tree.name)
        if isinstance(tree, NonTerminal):
            return values[tree.name] if tree.name in values else self.reference(tree.name, ())
        children = tree.children
        if tree.data == "expansions":
            return ir.Choice(tuple(self.node(c, values) for c in children))
        if tree.data == "expansion":
            return ir.Concatenation(tuple(self.node(c, values) for c in children))
        if tree.data in ("alias", "value"):
            return self.node(children[0], values)
        if tree.data == "maybe":
            return ir.optional(self.node(children[0], values))
        if tree.data == "expr":
            return self.repeat(self.node(children[0], values), *children[1:])
        if tree.data in ("literal", "range"):
            return self.literal(tree)
        if tree.data == "template_usage":
            return self.reference(children[0].name, tuple(self.node(c, values) for c in children[1:]))
        raise AssertionError(tree.data)

    def repeat(self, item: ir.Node, operator: Any, *counts: Any) -> ir.Node:
        if operator == "*":
            return ir.Repeat(item)
        if operator == "+":
            return ir.Repeat(item, 1)
        if operator == "?":
            return ir.optional(item)
        low, high = int(counts[0]), int(counts[-1])
        line = counts[0].line if isinstance(counts[0], Token) else None
        if high < low:
            self.fail(f"~{low}..{high} asks for at least {low} and at most {high}", line)
        if high > MAX_COUNT:
            raise GrammarTooLarge(self.located(f"~{high} repeats more than {MAX_COUNT:,} times", line))
        return ir.Repeat(item, low, high)

    def reference(self, name: str, arguments: tuple[ir.Node, ...]) -> ir.Node:
        """Return a reference to a rule. A template with its arguments becomes a rule of its own."""
        if name not in self.templates:
            self.fail(f"{name!r} is used as a template but is a parameter", self.line_of(self.rule))
        parameters, tree = self.templates[name]
        if len(arguments) != len(parameters):
            self.fail(
                f"the template {name!r} takes {len(parameters)} arguments, and here it has {len(arguments)}",
                self.line_of(name),
            )
        key = name
        if arguments:
            numbers = (self.argument_numbers.setdefault(a, len(self.argument_numbers)) for a in arguments)
            key = f"{name}{{{', '.join(map(str, numbers))}}}"
        if key not in self.rules:
            if len(self.rules) >= MAX_RULES:
                raise GrammarTooLarge(
                    self.located(f"the grammar has more than {MAX_RULES:,} rules", self.line_of(name))
                )
            self.rules[key] = ir.NOTHING  # replaced when `pending` is processed
            self.pending.append((key, tree, dict(zip(parameters, arguments, strict=True))))
        return ir.Reference(key)

    # --- terminals

    def terminal(self, name: str) -> ir.Node:
        found = self.terminals.get(name)
        if found is None:
            tree = self.terminal_trees[name]
            line = self.line_of(name)
            if tree is None:
                self.fail(f"terminal {name} is declared but has no definition", line)
            found = self.terminals[name] = self.pattern(self._pattern_of(tree, line), f"terminal {name}", line)
        return found

    def literal(self, tree: Any) -> ir.Node:
        token = tree.children[0]
        line = token.line if isinstance(token, Token) else None
        return self.pattern(self._pattern_of(tree, line), f"the terminal {token}", line)

    def _pattern_of(self, tree: Any, line: int | None) -> Pattern:
        transformer = PrepareLiterals() * TerminalTreeToPattern()
        try:
            return transformer.transform(nr_deepcopy_tree(tree))
        except (lark.exceptions.LarkError, AssertionError) as error:
            self.fail(_first_line(error) or "the terminal cannot be read", line, cause=error)

    def pattern(self, pattern: Pattern, name: str, line: int | None) -> ir.Node:
        """Return a terminal, together with what is ignored after it, as one table."""
        key = (type(pattern) is PatternStr, pattern.value, frozenset(pattern.flags))
        found = self.terminals.get(repr(key))
        if found is None:
            try:
                item = _terminal_node(*key, self.max_regular_states, name)
            except InvalidRegex as error:
                self.fail(f"{name}: {error}", line, cause=error)
            except GrammarTooLarge as error:
                raise GrammarTooLarge(self.located(str(error), line)) from error
            if isinstance(item, ir.Table) and bool(item.accepting[0]):
                self.fail(f"{name} matches the empty text; make it optional in the rules instead", line)
            if self.ignored != ir.EMPTY:
                item = self._table(ir.Concatenation((item, self.ignored)), name)
            found = self.terminals[repr(key)] = item
        return found

    def _table(self, node: ir.Node, name: str) -> ir.Table:
        dfa = regular.compile_bytes(node, max_states=self.max_regular_states, name=name)
        return dfas.table(dfa)

    # --- errors

    def line_of(self, name: str) -> int | None:
        """Return the line in which a rule or terminal is defined or imported."""
        plain = re.escape(name.split("{")[0])
        for pattern in (rf"(?m)^\s*[!?]*{plain}\s*(?:\.-?\d+)?\s*[:{{]", rf"(?m)^.*\b{plain}\b"):
            found = re.search(pattern, self.source)
            if found:
                start = (
                    found.end()
                    if "^.*" in pattern
                    else found.start() + len(found.group()) - len(found.group().lstrip())
                )
                return self.source.count("\n", 0, start) + 1
        return None

    def fail_by_name(self, error: Exception) -> NoReturn:
        """Raise for an error of Lark's that has no line. The line is found by the names in its message."""
        message = str(error)
        if isinstance(error, lark.exceptions.LarkError):
            at = re.search(r"at line (\d+)(?:,)? column (\d+)", message)
            if at:
                self.fail(message.splitlines()[0].split(" at line")[0].rstrip(","), int(at[1]), int(at[2]), cause=error)
        user = re.search(r"\(in rule (\w+)\)", message)
        names = re.findall(r"'(\w+)'|\b(?:rule|for) (\w+)", message)
        candidates = [*([user[1]] if user else []), *(a or b for a, b in names)]
        line = next((n for n in map(self.line_of, candidates) if n is not None), None)
        self.fail(_first_line(error) or "the grammar cannot be read", line, cause=error)

    def fail(
        self, message: str, line: int | None = None, column: int | None = None, *, cause: Exception | None = None
    ) -> NoReturn:
        raise InvalidGrammar(self.located(message, line, column)) from cause

    def located(self, message: str, line: int | None, column: int | None = None) -> str:
        """Return the message with the user's own line under it."""
        lines = self.source.splitlines()
        if line is None or not 1 <= line <= len(lines):
            return f"the grammar: {message}"
        text = f"line {line} of the grammar: {message}\n    {lines[line - 1]}"
        return text if column is None else f"{text}\n    {' ' * (column - 1)}^"


@lru_cache(maxsize=1024)
def _terminal_node(is_text: bool, value: str, flags: frozenset[str], max_states: int, name: str) -> ir.Node:
    """Return a terminal without what is ignored after it. Tables are kept, because compiling them takes long."""
    if is_text and not flags:
        return ir.Bytes(value.encode())
    bits = 0
    for flag in flags:
        bits |= _FLAGS[flag]
    terminal = parse_regex(re.escape(value) if is_text else value, bits, is_lexeme=True, name=name)
    return compile_text(terminal.item, max_states=max_states, name=name)


def _only_larks_own(base_path: str | None, grammar_path: str) -> tuple[Any, str]:
    """Import Lark's own grammars, and no others: a user's grammar must not read files."""
    try:
        found: tuple[Any, str] = stdlib_loader(base_path, grammar_path)
        return found
    except OSError as error:
        name = grammar_path.removesuffix(".lark").replace("/", ".")
        raise lark.exceptions.GrammarError(
            f"cannot import from '{name}': only Lark's own grammars (common, python, unicode, lark) can be imported"
        ) from error


def _regular_rules(rules: Mapping[str, ir.Node]) -> set[str]:
    """Return the names of the rules without recursion, which are inlined.

    Raises: GrammarTooLarge for rules whose size doubles again and again.
    """
    sizes: dict[str, int] = {}
    waiting = dict(rules)
    while waiting:
        ready = [n for n, node in waiting.items() if ir.references(node) <= sizes.keys()]
        if not ready:
            break
        for name in ready:
            sizes[name] = _size(waiting.pop(name), sizes)
            if sizes[name] > MAX_SIZE:
                raise GrammarTooLarge(f"rule {name!r} written out has more than {MAX_SIZE:,} parts; simplify it")
    return set(sizes)


def _size(node: ir.Node, sizes: Mapping[str, int]) -> int:
    match node:
        case ir.Reference(rule):
            return sizes[rule]
        case ir.Concatenation(parts) | ir.Choice(parts):
            return 1 + sum(_size(p, sizes) for p in parts)
        case ir.Repeat(item, low, high):
            return 1 + _size(item, sizes) * max(1, low if high is None else high)
    return 1


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"Token\('(\w+)', (.*?)\) at line \d+, column \d+\.", r"\2", lines[0]) if lines else ""
