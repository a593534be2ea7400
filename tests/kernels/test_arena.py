"""The memory of images: apart from each other, aligned, handed out again, never taken from whoever still reads."""

from __future__ import annotations

import gc

import pytest
import torch
from padst_kernels.cpu import arena
from padst_kernels.cpu.arena import ALIGN, CHUNK, Arena, image_memory

pytestmark = pytest.mark.skipif(arena._ARENA is None, reason="this system has no huge pages")


def test_pieces_are_aligned_and_do_not_overlap():
    pool = Arena()
    pieces = [pool.take(size) for size in (1, 64, 1000, 3 << 20, 77)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % ALIGN == 0
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))
    assert [len(piece) for piece in pieces] == [1, 64, 1000, 3 << 20, 77]


def test_without_huge_pages_images_lie_in_ordinary_memory(monkeypatch):
    monkeypatch.setattr(arena, "_ARENA", None)
    with torch.device("meta"):
        piece = image_memory(1000)
    assert piece.is_cpu
    assert len(piece) == 1000
    assert piece.data_ptr() % ALIGN == 0


def test_what_nobody_reads_is_handed_out_again():
    pool = Arena()
    kept, freed = pool.take(5000), pool.take(5000)
    address = freed.data_ptr()
    del freed
    gc.collect()
    assert pool.take(4096).data_ptr() == address
    assert len(kept) == 5000


def test_a_view_keeps_the_memory_of_its_tensor():
    pool = Arena()
    piece = pool.take(4096)
    piece.fill_(7)
    view = piece[100:200].view(torch.float32)
    expected = view.clone()
    del piece
    gc.collect()
    others = [pool.take(4096).fill_(1) for _ in range(4)]
    assert len(others) == 4
    assert torch.equal(view, expected)


def test_neighbours_merge_when_they_are_freed():
    pool = Arena()
    pieces = [pool.take(1 << 20) for _ in range(3)]
    first = pieces[0].data_ptr()
    last = pool.take(64)
    pieces.clear()
    gc.collect()
    assert pool.take(3 << 20).data_ptr() == first
    assert len(last) == 64


def test_an_empty_chunk_goes_back_to_the_system():
    pool = Arena()
    piece = pool.take(100)
    assert len(pool._chunks) == 1
    del piece
    gc.collect()
    pool._drain()
    assert pool._chunks == []


def test_pieces_larger_than_a_chunk_get_one_of_their_own():
    pool = Arena()
    small, large = pool.take(10), pool.take(CHUNK + 5)
    large[-1] = 3
    assert len(pool._chunks) == 2
    assert len(small) == 10


def test_without_huge_pages_memory_is_aligned_all_the_same(monkeypatch):
    monkeypatch.setattr(arena, "_ARENA", None)
    assert all(image_memory(size).data_ptr() % ALIGN == 0 for size in (1, 100, 4097))
