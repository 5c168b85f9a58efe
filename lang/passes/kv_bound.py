"""KV bound: the most KV cache that a program can need, whatever its generations write.

Every part of every path counts once, even if it is shared, and all branches may be alive together, so no run exceeds
the bound. A runtime with pages shares only whole pages: a branch that leaves another within a page has its own copy of
that page. There the bound is a number of pages, and its tokens are those that fit into them. The bound in bytes is the
number of tokens times the model's bytes per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ramet.lang.passes.requests import RequestPlan


@dataclass(frozen=True, slots=True)
class KvBound:
    """`tokens`: the bound. `pages`: the bound in the runtime's pages; None if these are unknown.

    `known`: tokens that every run needs. `longest`: tokens of the longest request with its text. `is_complete` False:
    the graph is the first part of a program, and the bound holds for that part only.
    """

    tokens: int
    pages: int | None
    known: int
    longest: int
    is_complete: bool


def kv_bound(plan: RequestPlan, *, context_length: int, page_size: int = 1, is_complete: bool = True) -> KvBound:
    """Return the bound of one graph. O(requests)."""
    longest = max((request.prompt.at_most + request.written.at_most for request in plan.requests), default=0)
    tokens = plan.kv.at_most if page_size == 1 else most_pages([plan], page_size) * page_size
    return KvBound(tokens, tokens // page_size, plan.kv.at_least, min(longest, context_length), is_complete)


def most_pages(plans: Sequence[RequestPlan], page_size: int, num_common: int = 0) -> int:
    """Return the most pages of several programs whose prompts share their first `num_common` tokens."""
    pages = sum(request.pages(page_size) for plan in plans for request in plan.requests)
    return pages - num_common // page_size * (len(plans) - 1)
