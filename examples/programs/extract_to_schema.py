"""Extraction: free text in, a typed object out; always valid, never parsed by hand."""

from dataclasses import dataclass
from typing import Literal

from ramet import State, function, gen

EXAMPLE = {"mail": "Hello, I'm Rosa Lind. The blue lamp I bought on Monday is broken, please send me a new one!"}
SCRIPT = {"Ticket:": '{"customer": "Rosa Lind", "product": "blue lamp", "kind": "replacement", "is_urgent": false}'}


@dataclass
class Ticket:
    customer: str
    product: str
    kind: Literal["refund", "replacement", "question"]
    is_urgent: bool


@function(temperature=0)
def extract(s: State, mail: str) -> None:
    s += f"Mail: {mail}\nTicket: " + gen("ticket", Ticket, max_tokens=200)


def main() -> None:
    ticket = extract.run(**EXAMPLE)["ticket"]
    print(ticket, "=>", ticket.kind)


if __name__ == "__main__":
    main()
