"""Who owns which page of the native KV cache, and which pages hold text that another request may share.

A full page is named by a digest of all tokens up to its end, so equal prefixes find each other's pages. A page that
nobody uses keeps its content until the space is needed; the one unused for longest goes first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from halfturn.error import Error


def page_digest(previous: bytes, tokens: Sequence[int], drawn: int = 0) -> bytes:
    """Name of a full page: 16 bytes from the digest of the page before it (b"" for the first) and its own tokens.

    drawn: how many of its last ones were not of the prompt, where that makes a difference to keys and values.
    """
    own = array("q", [*tokens, drawn] if drawn else tokens)
    return blake2b(previous + own.tobytes(), digest_size=16).digest()


class PagePool:
    """Reference-counted pages 0..count-1 of `page_size` tokens each."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count, self.page_size = count, page_size
        self._free = list(range(count - 1, -1, -1))  # a stack: page 0 first, so that little memory is touched
        self._users = [0] * count
        self._digest: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # pages with content and no user, the oldest first

    @property
    def available(self) -> int:
        """Pages that allocate() can hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that some request holds."""
        return self.count - self.available

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages for one user each, or None if so many are not available."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._idle))
                del self._idle[page]
                del self._page[self._digest.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def acquire(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest prefix of `digests` that is cached, each with one user more."""
        pages = []
        for digest in digests:
            page = self._page.get(digest)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Offers a full page to later requests. A page with the same content keeps its place as the shared one."""
        if page not in self._digest and digest not in self._page:
            self._digest[page] = digest
            self._page[digest] = page

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each page. A prefix's last pages become the oldest, so that its beginning stays longest."""
        for page in reversed(pages):
            if self._users[page] <= 0:
                raise Error(f"page {page} is released, but nobody uses it; this is a bug of Halfturn, please report it")
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._free.append(page)
