"""Every way to hash against hashlib, in any number of streams and any cut."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_ascend import native
from qwen3_ascend.native.sha256 import Digests, HashlibDigests, NativeDigests, digests

CORNERS = [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000]


def ways() -> list[Digests]:
    """Hashlib, and the kernel where the processor has the instructions."""
    found = digests()
    return [HashlibDigests(), *([found] if isinstance(found, NativeDigests) else [])]


def expected(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("way", ways(), ids=lambda way: type(way).__name__)
@pytest.mark.parametrize("nbytes", CORNERS)
def test_one_stream(way: Digests, nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    digest = way.start()
    digest.update(memoryview(data))
    assert digest.hexdigest() == expected(data)
    digest.update(memoryview(b"more"))  # asking for the hash has not ended it
    assert digest.hexdigest() == expected(data + b"more")


@pytest.mark.parametrize("way", ways(), ids=lambda way: type(way).__name__)
@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, 700), min_size=1, max_size=7), max_size=5),
       seed=st.integers(0, 2**32))  # fmt: skip
def test_many_streams(way: Digests, steps: list[list[int]], seed: int) -> None:
    """Each step appends so many bytes to the first, second, ... stream."""
    chance = random.Random(seed)
    streams = [way.start() for _ in range(7)]
    texts = [b"" for _ in range(7)]
    for step in steps:
        pieces = [chance.randbytes(nbytes) for nbytes in step]
        way.update([(streams[i], memoryview(piece)) for i, piece in enumerate(pieces)])
        for i, piece in enumerate(pieces):
            texts[i] += piece
    assert [digest.hexdigest() for digest in streams] == [expected(text) for text in texts]


@pytest.mark.parametrize("way", ways(), ids=lambda way: type(way).__name__)
def test_one_digest_twice_and_more_than_fit_in_a_call(way: Digests) -> None:
    first, others = way.start(), [way.start() for _ in range(150)]
    pieces = [(first, b"a" * 100), (first, b"b" * 70), *((other, b"c" * 64) for other in others),
              (first, b"d")]  # fmt: skip
    way.update([(digest, memoryview(data)) for digest, data in pieces])
    assert first.hexdigest() == expected(b"a" * 100 + b"b" * 70 + b"d")
    assert {other.hexdigest() for other in others} == {expected(b"c" * 64)}


def test_switch_turns_the_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", "0")
    assert isinstance(digests(), HashlibDigests)
    assert native.load() is None


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_ascend.native.library.Library.has_sha256", lambda library: False)
    assert isinstance(digests(), HashlibDigests)
