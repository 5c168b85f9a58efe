r"""Grammars in GBNF -> Lark's syntax. GBNF is the notation of llama.cpp; SGLang's `ebnf` and XGrammar take it, too.

    root  ::= "yes" | list            a rule; `root` is the start
    list  ::= "[" item ("," item)* "]"
    item  ::= [a-z]+ | [^\n\x41]{1,3} | .

Understood: literals and classes with the escapes `\n \r \t \" \\ \] \[ \- \^ \/ \xNN \uNNNN \UNNNNNNNN`, groups, `|`,
`* + ? {m} {m,} {m,n}`, `#` comments. A rule ends at the next `name ::=` and may take several lines. Refused:
lookaheads, XGrammar's TagDispatch, tokens in `<>`.
Source: the notation is described in llama.cpp's grammars/README.md.
"""

from __future__ import annotations

import re

from ramet.errors import InvalidGrammar

_RULE = re.compile(r"^[ \t]*([A-Za-z_][\w-]*)[ \t]*::=", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
      | (?P<rule>[A-Za-z_][\w-]*)\s*::=
      | (?P<name>[A-Za-z_][\w-]*)
      | (?P<literal>"(?:[^"\\\n]|\\.)*")
      | (?P<set>\[(?:[^\]\\\n]|\\.)+\])
      | (?P<count>\{\s*\d+\s*(?:,\s*\d*\s*)?\})
      | (?P<mark>[()|*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t"} | {c: c for c in "\"'\\[]-^/"}


def is_gbnf(source: str) -> bool:
    """Tell whether a grammar has rules written with `::=`. Lark writes them with `:`."""
    return _RULE.search(source) is not None


def lark_of_gbnf(source: str) -> str:
    """Return the grammar in Lark's syntax. `root` becomes `start`.

    Raises: InvalidGrammar with the line.
    """
    return _Translation(source).written()


class _Translation:
    def __init__(self, source: str) -> None:
        self._source = source
        self._names: dict[str, str] = {"root": "start"}
        self._taken = {"start"}

    def written(self) -> str:
        rules: dict[str, list[str]] = {}
        used: dict[str, int] = {}  # name -> where it was first used
        body: list[str] | None = None
        depth = 0
        at = 0
        while at < len(self._source):
            match = _TOKEN.match(self._source, at)
            if match is None:
                raise self._error(at, f"{self._source[at : at + 20]!r} is not understood")
            kind, text = match.lastgroup, match[0]
            if kind == "rule":
                name = match["rule"]
                if depth:
                    raise self._error(at, f"a parenthesis is still open where rule {name!r} begins")
                if name in rules:
                    raise self._error(at, f"rule {name!r} is defined twice")
                body = rules[name] = []
            elif kind != "space":
                if body is None:
                    raise self._error(at, f"{text!r} stands before the first rule")
                if kind == "name":
                    used.setdefault(text, at)
                depth += (text == "(") - (text == ")")
                if depth < 0:
                    raise self._error(at, "a parenthesis is closed that was not opened")
                self._add(body, kind or "", text, at)
            at = match.end()
        if depth:
            raise self._error(at, "a parenthesis is not closed")
        if "root" not in rules:
            raise InvalidGrammar("the grammar has no rule `root`, where it begins")
        missing = next((name for name in used if name not in rules), None)
        if missing is not None:
            raise self._error(used[missing], f"there is no rule {missing!r}")
        return "\n".join(f"{self._name(name)}: {' '.join(parts)}" for name, parts in rules.items()) + "\n"

    def _add(self, body: list[str], kind: str, text: str, at: int) -> None:
        """Append the next token of a rule, in Lark's syntax."""
        if kind == "name":
            body.append(self._name(text))
        elif kind == "literal":
            body.append(f'"{_spelled(self._unescaped(text[1:-1], at), chr(34))}"' if len(text) > 2 else "()")
        elif kind == "set":
            body.append(self._set(text, at))
        elif text == ".":
            body.append("/(?s:.)/")
        elif kind == "count" or text in "*+?":
            if not body or body[-1] in ("(", "|") or body[-1][-1:] in "*+?~":
                raise self._error(at, f"{text!r} repeats nothing")
            body.append(self._count(text, at) if kind == "count" else text)
            self._bind(body)
        else:
            body.append(text)

    def _bind(self, body: list[str]) -> None:
        """Put the last item and its repeat into one group, so that another repeat may follow."""
        count = body.pop()
        start = len(body) - 1
        if body[start] == ")":
            depth = 0
            for start in range(len(body) - 1, -1, -1):
                depth += (body[start] == ")") - (body[start] == "(")
                if not depth:
                    break
        item = " ".join(body[start:])
        del body[start:]
        if count.startswith("~"):
            low, _, high = count[1:].partition("..")
            least = f"{item}~{low}" if int(low) else ""
            more = f"{item}*" if not high else ""
            if not high:
                written = f"{least} {more}".strip()
            elif int(high) == 0:
                written = ""
            else:
                written = f"{item}~{low}..{high}"
            body.append(f"({written})")
        else:
            body.append(f"({item}{count})")

    def _count(self, text: str, at: int) -> str:
        """Write `{m,n}` as `~m..n`, and `{m,}` as `~m..`."""
        low, comma, high = (part.strip() for part in text[1:-1].partition(","))
        if comma and high and int(high) < int(low):
            raise self._error(at, f"{text} counts from {low} to {high}")
        return f"~{low}..{high if comma else low}"

    def _set(self, text: str, at: int) -> str:
        r"""Write a class, such as `[^a-z\n]`, as a regexp of Lark's."""
        inner = text[1:-1]
        negated = inner.startswith("^") and len(inner) > 1
        written, ranged = "", False
        pieces = re.findall(
            r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|[^\\]", inner[negated:], re.DOTALL
        )
        for index, piece in enumerate(pieces):
            if piece == "-" and 0 < index < len(pieces) - 1 and not ranged:
                written, ranged = written + "-", True
                continue
            ranged = False
            written += _escaped(self._unescaped(piece, at))
        return f"/[{'^' if negated else ''}{written}]/"

    def _unescaped(self, text: str, at: int) -> str:
        def plain(match: re.Match[str]) -> str:
            escape = match[1]
            if len(escape) > 1:
                code = int(escape[1:], 16)
                if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                    raise self._error(at, f"\\{escape} is no character")
                return chr(code)
            if escape not in _PLAIN:
                raise self._error(at, f"the escape \\{escape} is not understood")
            return _PLAIN[escape]

        return _ESCAPE.sub(plain, text)

    def _name(self, name: str) -> str:
        """Return a rule's name in the form that Lark allows: small letters, digits, underscores."""
        if name not in self._names:
            plain = base = "g_" + re.sub(r"[^a-z0-9_]", "_", name.lower())
            number = 1
            while plain in self._taken:
                number += 1
                plain = f"{base}_{number}"
            self._names[name] = plain
            self._taken.add(plain)
        return self._names[name]

    def _error(self, at: int, message: str) -> InvalidGrammar:
        line = self._source.count("\n", 0, at) + 1
        return InvalidGrammar(f"line {line} of the grammar: {message}")


def _spelled(text: str, quote: str) -> str:
    """Return the inside of a literal for Lark, in printable ASCII."""
    return "".join(f"\\{c}" if c in (quote, "\\") else c if " " <= c <= "~" else f"\\U{ord(c):08x}" for c in text)


def _escaped(c: str) -> str:
    """Return a character as it is written in a class of a regexp between slashes."""
    if " " <= c <= "~":
        return c if c.isalnum() else f"\\{c}"
    return f"\\U{ord(c):08x}"
