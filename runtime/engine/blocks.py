"""Who holds which block of the paged key/value cache. Host only: no torch, no device.

A block is referenced by the requests that read it, or free. A full block keeps the name of its
content when the last reference goes, and whoever begins with the same tokens takes it up again;
free blocks without such a name are given away first, then the one that was unused longest.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from blake3 import blake3

from qwen3_ascend.runtime.backends.cache import SCRATCH_BLOCK
from qwen3_ascend.runtime.engine.request import Request


class BlockPool:
    """The blocks of one cache. Block 0 is scratch: padding rows write there, no request does."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        """Blocks 1 to num_blocks - 1 are free.

        Args:
            num_blocks: of the cache, the scratch block included.
            block_size: tokens of a block.
            prefix_cache: whether the content of full blocks is found again.
        """
        self.num_blocks, self.block_size = num_blocks, block_size
        self._prefix_cache = prefix_cache
        self._references: Counter[int] = Counter()
        self._empty = deque(range(SCRATCH_BLOCK + 1, num_blocks))
        self._unused: OrderedDict[int, None] = OrderedDict()  # with a key, longest unused first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody references."""
        return len(self._empty) + len(self._unused)

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing is referenced."""
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def missing(self, request: Request) -> int:
        """Blocks that a request lacks for all its known tokens."""
        return self.blocks_for(len(request.tokens)) - len(request.block_table)

    def room(self, request: Request) -> int:
        """Tokens that a request could compute, its own blocks and all free ones filled."""
        blocks = len(request.block_table) + self.free_blocks
        return blocks * self.block_size - request.begun

    def grow(self, request: Request, tokens: int) -> bool:
        """Gives a request the blocks for `tokens` in all; False, and nothing, if they are not
        free."""
        missing = self.blocks_for(tokens) - len(request.block_table)
        if missing > self.free_blocks:
            return False
        for _ in range(missing):
            request.block_table.append(self._take())
        return True

    def release(self, request: Request) -> None:
        """Takes the references of a request back. What it has computed may be found again; its
        last blocks are forgotten first, because a prefix without its beginning is of no use."""
        for block in reversed(request.block_table):
            self._references[block] -= 1
            if not self._references[block]:
                del self._references[block]
                if block in self._key_of:
                    self._unused[block] = None
                else:
                    self._empty.append(block)
        request.block_table.clear()
        request.computed = request.in_flight = 0

    def adopt_prefix(self, request: Request) -> None:
        """Lets a request that holds nothing begin with the blocks that are known already.

        At least one token is left to compute, since its logits are wanted.
        """
        for index in range(self.shareable_blocks(request)):
            block = self._block_of.get(self.key(request, index))
            if block is None:
                break
            self._unused.pop(block, None)
            self._references[block] += 1
            request.block_table.append(block)
        request.computed = len(request.block_table) * self.block_size

    def knows(self, request: Request, index: int) -> bool:
        """Whether the content of one of a request's full blocks is in the cache."""
        return self.key(request, index) in self._block_of

    def publish(self, request: Request, before: int) -> None:
        """Lets others find the full blocks that a request has computed since `before` tokens."""
        if not self._prefix_cache or request.wants_logits:
            return
        for index in range(before // self.block_size, request.computed // self.block_size):
            key, block = self.key(request, index), request.block_table[index]
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key

    def shareable_blocks(self, request: Request) -> int:
        """How many of a request's blocks could come from another one."""
        if not self._prefix_cache or request.wants_logits:
            return 0
        return (len(request.tokens) - 1) // self.block_size

    def key(self, request: Request, index: int) -> bytes:
        """The name of a full block's content: a hash of its tokens and of all before them."""
        keys, size = request.prefix_keys, self.block_size
        while len(keys) <= index:
            start = len(keys) * size
            digest = blake3(keys[-1] if keys else b"")
            digest.update(array("q", request.tokens[start : start + size]).tobytes())
            keys.append(digest.digest())
        return keys[index]

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """AssertionError if a block was lost, or is referenced by others than by these requests."""
        held = Counter(block for request in requests for block in request.block_table)
        assert held == self._references, "references"
        everywhere = [*self._references, *self._empty, *self._unused]
        assert sorted(everywhere) == list(range(SCRATCH_BLOCK + 1, self.num_blocks)), "blocks"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys"
        assert set(self._unused) <= set(self._key_of) and not set(self._empty) & set(self._key_of)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._references[block] = 1
        return block
