"""The inputs of one forward pass, on the host and on a device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """One step over B requests with T new tokens in all; everything a forward may know.

    Attributes:
        tokens: [T] int32, token ids.
        positions: [T] int32, position of each token in its request.
        slots: [T] int32, where its key and value go: block * block_size + offset.
        block_table: [B, longest] int32, the blocks of each request, padded with scratch.
        context_lens: B tokens in the cache after this step. Host integers, because Ascend's
            attention reads them from the host.
        query_starts: B + 1 row numbers; rows query_starts[i] to query_starts[i + 1] are request
            i's.
        logit_rows: [R] int64, the rows whose logits are wanted; None for all T.
        carried: [C] int64 on the device, the tokens of the first C rows, where the host does not
            know them yet; None if it knows all.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    context_lens: tuple[int, ...]
    query_starts: tuple[int, ...]
    logit_rows: Tensor | None
    carried: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        """Whether there is one token for each request."""
        return self.query_starts == tuple(range(len(self.context_lens) + 1))

    def fill_in(self, tokens: Tensor) -> None:
        """Writes the carried tokens into a copy of `tokens` on the device."""
        if self.carried is not None:
            tokens[: len(self.carried)].copy_(self.carried)


@dataclass(frozen=True)
class DeviceStep:
    """A step on its device.

    Attributes:
        inputs: with their tensors there.
        cos, sin: of the rotary embedding at the step's positions, [T, 1, head_dim], the values of
            both halves filled in.
        hidden: [B, 1, longest] bool, the places of its blocks that a request must not see; None
            where `context_lens` of the inputs says that.
    """

    inputs: StepInputs
    cos: Tensor
    sin: Tensor
    hidden: Tensor | None = None
