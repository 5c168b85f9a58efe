"""String formats as regular languages, each by its RFC. Formats that are not here are annotations and enforce nothing.

Exceptions to exactness, on the strict side: year 0000 is left out (readers refuse it); `regex` allows groups nested at
most four deep; host names are checked label by label, without the total length and the meaning of punycode.
"""

from __future__ import annotations

from functools import cache

from ramet.grammar import ir
from ramet.grammar.json_schema.pattern import search

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_MONTH_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?!0000)(?:[0-9]{{4}}-{_MONTH_DAY}|{_LEAP}-02-29)"
_OFFSET = "(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# a leap second is the last of a UTC day; whether it is one depends on the offset, so only the common cases are allowed
_TIME = (
    f"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]+)?{_OFFSET}|23:59:60(?:\\.[0-9]+)?(?:[Zz]|[+-]00:00))"
)

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
_IDN_HOSTNAME = f"{_IDN_LABEL}(?:\\.{_IDN_LABEL})*"
_IDN_ATEXT = f"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~{_UCS}-]"
_IDN_EMAIL = f"{_IDN_ATEXT}+(?:\\.{_IDN_ATEXT}+)*@{_IDN_HOSTNAME}"


def _uri(extra: str, private: str, *, relative: bool) -> str:
    """RFC 3986 appendix A (RFC 3987 section 2.2 with the wider character sets)."""
    unreserved = f"0-9A-Za-z._~{extra}\\-"
    escape = "%[0-9A-Fa-f]{2}"
    pchar = f"(?:[{unreserved}!$&'()*+,;=:@]|{escape})"
    query = f"(?:[{unreserved}!$&'()*+,;=:@/?{private}]|{escape})*"
    fragment = f"(?:[{unreserved}!$&'()*+,;=:@/?]|{escape})*"
    host = (
        f"(?:\\[(?:{_IPV6}|[vV][0-9A-Fa-f]+\\.[0-9A-Za-z._~!$&'()*+,;=:-]+)\\]|(?:[{unreserved}!$&'()*+,;=]|{escape})*)"
    )
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
    name = f"(?:[0-9A-Za-z_]|{escape})(?:\\.?(?:[0-9A-Za-z_]|{escape}))*"
    variable = f"{name}(?:\\*|:[1-9][0-9]{{0,3}})?"
    return f"(?:{literal}|\\{{[+#./;?&=,!@|]?{variable}(?:,{variable})*\\}})*"


def _regex() -> str:
    """Well-formed regular expressions, groups nested at most four deep."""
    escape = "\\\\(?:[dDwWsSbBnrtfv0^$\\\\.*+?()\\[\\]{}|/-]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})"
    klass = f"\\[\\^?(?:[^\\\\\\[\\]-]|{escape})(?:[^\\\\\\[\\]-]|{escape})*\\]"
    ranges = "\\[\\^?(?:[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|[_.]|\\\\[dws])+-?\\]"
    atom = f"(?:[^\\\\()\\[\\]{{}}*+?|^$]|{escape}|{klass}|{ranges})"
    count = "(?:[*+?]|\\{[0-9]\\}|\\{[0-9],\\})\\??"
    level = f"(?:{atom}(?:{count})?|[\\^$|])*"
    for _ in range(2):
        level = f"(?:{atom}(?:{count})?|[\\^$|]|\\((?:\\?[:=!])?{level}\\)(?:{count})?)*"
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
    "idn-hostname": _IDN_HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uri": _uri("", "", relative=False),
    "uri-reference": _uri("", "", relative=True),
    "iri": _uri(_UCS, "\\uE000-\\uF8FF", relative=False),
    "iri-reference": _uri(_UCS, "\\uE000-\\uF8FF", relative=True),
    "uri-template": _uri_template(),
    "uuid": "[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
    "relative-json-pointer": "(?:0|[1-9][0-9]*)(?:#|(?:/(?:[^/~]|~[01])*)*)",
    "regex": _regex(),
}
_PATTERNS["ip-address"] = _PATTERNS["ipv4"]  # draft 3's names
_PATTERNS["host-name"] = _PATTERNS["hostname"]

KNOWN = frozenset(_PATTERNS)


@cache
def format_node(name: str) -> ir.Node:
    """Return the language of a known format, over code points."""
    return search(f"^(?:{_PATTERNS[name]})$")
