"""KV bound: how much of the cache a program can need, whatever its generations write.

Every part of every path counts once, shared ones too, and all branches may be alive together: no run exceeds it. A
runtime with pages shares whole ones; a branch that leaves another within a page has a copy of that page, so there the
bound is a number of pages, and its tokens are those that fit into them. Times the model's bytes per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ramet.lang.passes.requests import RequestPlan


@dataclass(frozen=True, slots=True)
class KvBound:
    """`tokens`: the limit. `pages`: the same in the runtime's pages; None where they are not known.

    `known`: tokens that are sure to be needed. `longest`: tokens of one request and its text. `is_complete` False: the
    graph is the first part of a program, and the limit holds for that part alone.
    """

    tokens: int
    pages: int | None
    known: int
    longest: int
    is_complete: bool


def kv_bound(plan: RequestPlan, *, context_length: int, page_size: int = 1, is_complete: bool = True) -> KvBound:
    """The bound of one graph. O(requests)."""
    longest = max((request.prompt.at_most + request.written.at_most for request in plan.requests), default=0)
    tokens = plan.kv.at_most if page_size == 1 else most_pages([plan], page_size) * page_size
    return KvBound(tokens, tokens // page_size, plan.kv.at_least, min(longest, context_length), is_complete)


def most_pages(plans: Sequence[RequestPlan], page_size: int, num_common: int = 0) -> int:
    """The most pages of several programs whose prompts all begin with the same `num_common` tokens."""
    pages = sum(request.pages(page_size) for plan in plans for request in plan.requests)
    return pages - num_common // page_size * (len(plans) - 1)
