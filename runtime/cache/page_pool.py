"""The pool of KV pages: it knows which page ids are free. Plain Python, without tensors.

Not here: the owner of a page that is not free. That is a node of the radix cache (`radix_cache`) or one sequence
(`scheduler`). `integrity.check_cache` compares the three.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ramet.errors import CacheIntegrityError

logger = logging.getLogger(__name__)

_USED, _FREE, _QUARANTINED = 0, 1, 2


class PagePool:
    """Page ids 1..num_pages-1, each for `page_size` token positions. Page 0 is the dummy page and is never allocated.

    A page with broken accounting (freed twice) is quarantined: counted, logged, and never allocated again.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 2, f"a pool of {num_pages} pages holds nothing: page 0 is reserved"
        assert page_size >= 1, page_size
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_total = num_pages - 1
        self.num_quarantined = 0
        self._stack = list(range(num_pages - 1, 0, -1))
        self._state = bytearray([_USED]) + bytearray([_FREE]) * (num_pages - 1)

    @property
    def num_free(self) -> int:
        return len(self._stack)

    @property
    def num_usable(self) -> int:
        """Pages that are not quarantined."""
        return self.num_total - self.num_quarantined

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free pages, or return None if there are fewer. O(count)."""
        stack, state = self._stack, self._state
        if count > len(stack):
            return None
        if count == 1:
            page = stack.pop()
            state[page] = _USED
            return [page]
        page_ids = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        for page in page_ids:
            state[page] = _USED
        page_ids.reverse()
        return page_ids

    def free(self, page_ids: Iterable[int]) -> None:
        """Give pages back. O(count)."""
        stack, state = self._stack, self._state
        for page in page_ids:
            if not 0 < page < self.num_pages:
                logger.error("page %d is not a page of the pool (1..%d): ignored", page, self.num_pages - 1)
            elif state[page] == _USED:
                state[page] = _FREE
                stack.append(page)
            else:
                self.quarantine(page)

    def quarantine(self, page: int) -> None:
        """Take a page out of use for good, because its owner is unknown: a bug elsewhere. O(num_free)."""
        if self._state[page] == _QUARANTINED:
            return
        if self._state[page] == _FREE:
            self._stack.remove(page)
        self._state[page] = _QUARANTINED
        self.num_quarantined += 1
        logger.error("page %d is quarantined: its accounting is broken (a bug)", page)

    def is_free(self, page: int) -> bool:
        return self._state[page] == _FREE

    def used_pages(self) -> set[int]:
        """Ids of the pages that are neither free nor quarantined. O(num_pages)."""
        return {page for page in range(1, self.num_pages) if self._state[page] == _USED}

    def check_integrity(self) -> None:
        """Check the free list against the page states. O(num_pages).

        Raises:
            CacheIntegrityError: a page is twice in the free list, or listed and not free.
        """
        listed = set(self._stack)
        if len(listed) != len(self._stack):
            raise CacheIntegrityError("a page is twice in the free list")
        free = {page for page in range(1, self.num_pages) if self._state[page] == _FREE}
        if listed != free:
            raise CacheIntegrityError(f"free list and page states differ on pages {sorted(listed ^ free)[:10]}")
        if self._state.count(_QUARANTINED) != self.num_quarantined:
            raise CacheIntegrityError("quarantined pages are miscounted")
