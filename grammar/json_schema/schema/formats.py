"""String formats as regular languages, each by its RFC. Other formats are annotations and enforce nothing.

Common validators refuse some texts that the RFCs allow. The languages here are narrower, so that every text passes
both. These are left out: the year 0000 and leap seconds (RFC 3339); reserved operators, and prefixes of 1000 or more,
in `uri-template` (RFC 6570); an upper-case `V` in the rare future IP literals of URIs; a zero before another digit in
`relative-json-pointer`; regular expressions in `regex` that ECMA-262 and Python do not both read, or with groups nested
more than three deep. The content of encoded labels (`xn--`) of a `hostname` is not checked. For `idn-hostname` see
hostnames.py.
"""

from __future__ import annotations

from functools import cache

from ramet.grammar import ir
from ramet.grammar.json_schema.schema import hostnames
from ramet.grammar.json_schema.schema.pattern import search

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_MONTH_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?!0000)(?:[0-9]{{4}}-{_MONTH_DAY}|{_LEAP}-02-29)"
_OFFSET = "(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = f"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]+)?{_OFFSET}"

_IPV4_PART = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = f"{_IPV4_PART}(?:\\.{_IPV4_PART}){{3}}"
_H16 = "[0-9A-Fa-f]{1,4}"
_LS32 = f"(?:{_H16}:{_H16}|{_IPV4})"
_IPV6 = (
    f"(?:(?:{_H16}:){{6}}{_LS32}|::(?:{_H16}:){{5}}{_LS32}|(?:{_H16})?::(?:{_H16}:){{4}}{_LS32}"
    f"|(?:(?:{_H16}:){{0,1}}{_H16})?::(?:{_H16}:){{3}}{_LS32}|(?:(?:{_H16}:){{0,2}}{_H16})?::(?:{_H16}:){{2}}{_LS32}"
    f"|(?:(?:{_H16}:){{0,3}}{_H16})?::{_H16}:{_LS32}|(?:(?:{_H16}:){{0,4}}{_H16})?::{_LS32}"
    f"|(?:(?:{_H16}:){{0,5}}{_H16})?::{_H16}|(?:(?:{_H16}:){{0,6}}{_H16})?::)"
)

_LABEL = "[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
_HOSTNAME = f"{_LABEL}(?:\\.{_LABEL})*"
_ATEXT = "[0-9A-Za-z!#$%&'*+/=?^_`{|}~-]"
_QUOTED = '"(?:[\\x20\\x21\\x23-\\x5b\\x5d-\\x7e]|\\\\[\\x20-\\x7e])*"'
_EMAIL = f"(?:{_ATEXT}+(?:\\.{_ATEXT}+)*|{_QUOTED})@(?:{_HOSTNAME}|\\[(?:{_IPV4}|IPv6:{_IPV6})\\])"
_UCS = (
    "\\u00A0-\\uD7FF\\uF900-\\uFDCF\\uFDF0-\\uFFEF\\u{10000}-\\u{1FFFD}\\u{20000}-\\u{2FFFD}\\u{30000}-\\u{3FFFD}"
    "\\u{E1000}-\\u{EFFFD}"
)
_IDN_LABEL = f"[0-9A-Za-z{_UCS}](?:[0-9A-Za-z{_UCS}-]*[0-9A-Za-z{_UCS}])?"
_IDN_HOST = f"{_IDN_LABEL}(?:\\.{_IDN_LABEL})*"
_IDN_ATEXT = f"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~{_UCS}-]"
_IDN_EMAIL = f"{_IDN_ATEXT}+(?:\\.{_IDN_ATEXT}+)*@{_IDN_HOST}"


def _uri(extra: str, private: str, *, relative: bool) -> str:
    """RFC 3986 appendix A (RFC 3987 section 2.2 with the larger character sets)."""
    unreserved = f"0-9A-Za-z._~{extra}\\-"
    escape = "%[0-9A-Fa-f]{2}"
    pchar = f"(?:[{unreserved}!$&'()*+,;=:@]|{escape})"
    query = f"(?:[{unreserved}!$&'()*+,;=:@/?{private}]|{escape})*"
    fragment = f"(?:[{unreserved}!$&'()*+,;=:@/?]|{escape})*"
    host = f"(?:\\[(?:{_IPV6}|v[0-9A-Fa-f]+\\.[0-9A-Za-z._~!$&'()*+,;=:-]+)\\]|(?:[{unreserved}!$&'()*+,;=]|{escape})*)"
    authority = f"(?:(?:[{unreserved}!$&'()*+,;=:]|{escape})*@)?{host}(?::[0-9]*)?"
    hierarchy = f"(?://{authority}(?:/{pchar}*)*|/(?:{pchar}+(?:/{pchar}*)*)?|{pchar}+(?:/{pchar}*)*|)"
    no_colon = f"(?:[{unreserved}!$&'()*+,;=@]|{escape})"
    absolute = f"[A-Za-z][0-9A-Za-z+.-]*:{hierarchy}(?:\\?{query})?(?:#{fragment})?"
    if not relative:
        return absolute
    part = f"(?://{authority}(?:/{pchar}*)*|/(?:{pchar}+(?:/{pchar}*)*)?|{no_colon}+(?:/{pchar}*)*|)"
    return f"(?:{absolute}|{part}(?:\\?{query})?(?:#{fragment})?)"


def _uri_template() -> str:
    """RFC 6570 section 2."""
    escape = "%[0-9A-Fa-f]{2}"
    literal = f"(?:[\\x21\\x23\\x24\\x26\\x28-\\x3b\\x3d\\x3f-\\x5b\\x5d\\x5f\\x61-\\x7a\\x7e{_UCS}]|{escape})"
    name = f"[0-9A-Za-z_](?:\\.?(?:[0-9A-Za-z_]|{escape}))*"
    variable = f"{name}(?:\\*|:[1-9][0-9]{{0,2}})?"
    return f"(?:{literal}|\\{{[+#./;?&]?{variable}(?:,{variable})*\\}})*"


def _regex() -> str:
    """Well-formed regular expressions with groups nested at most three deep."""
    escape = "\\\\(?:[dDwWsSnrtfv]|[!-/:-@\\[-`{-~]|x[0-9A-Fa-f]{2}|u[0-9A-CE-Fa-ce-f][0-9A-Fa-f]{3})"
    # a regular language cannot compare the two ends of a range in general
    spans = "|".join(f"{a}-[{a}-{z}]|[{a}-{z}]-{z}" for a, z in ("09", "az", "AZ", "19")) + "|0-[0-9]|a-f|A-F"
    # a second set inside a class is left out, because Python warns of it
    item = f"(?:{spans}|[^\\\\\\[\\]^&~|-]|{escape})"
    klass = f"\\[\\^?-?{item}+-?\\]"
    atom = f"(?:[^\\\\()\\[\\]{{}}*+?|^$.]|\\.|{escape}|{klass})"
    between = "|".join([f"{low},[{low}-9]" for low in range(10)] + ["[0-9],[1-9][0-9]{1,2}"])
    count = f"(?:[*+?]|\\{{(?:[0-9]{{1,3}},?|{between})\\}})\\??"
    assertion = "[\\^$|]|\\\\[bB]"
    level = f"(?:{atom}(?:{count})?|{assertion})*"
    for _ in range(3):
        level = f"(?:{atom}(?:{count})?|{assertion}|\\((?:\\?:)?{level}\\)(?:{count})?|\\(\\?[=!]{level}\\))*"
    return level


_PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": "P(?:[0-9]+W|(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
    "(?:T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S))?"
    "|T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S))",
    "email": _EMAIL,
    "idn-email": _IDN_EMAIL,
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uri": _uri("", "", relative=False),
    "uri-reference": _uri("", "", relative=True),
    "iri": _uri(_UCS, "\\uE000-\\uF8FF", relative=False),
    "iri-reference": _uri(_UCS, "\\uE000-\\uF8FF", relative=True),
    "uri-template": _uri_template(),
    "uuid": "[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
    "relative-json-pointer": "(?:0|[1-9]+0?)(?:#|(?:/(?:[^/~]|~[01])*)*)",
    "regex": _regex(),
}
_PATTERNS["ip-address"] = _PATTERNS["ipv4"]  # names in draft 3
_PATTERNS["host-name"] = _PATTERNS["hostname"]

KNOWN = frozenset((*_PATTERNS, "idn-hostname"))

MAX_LENGTHS = {"hostname": 253, "host-name": 253, "idn-hostname": hostnames.MAX_CHARACTERS}
"""Characters of a whole text, not counted by its automaton (see lengths.py)."""


@cache
def format_node(name: str) -> ir.Node:
    """Return the language of a known format, over code points, without its limit of MAX_LENGTHS."""
    return hostnames.idn_hostname() if name == "idn-hostname" else search(f"^(?:{_PATTERNS[name]})$")
