"""Tensors of whole numbers in one."""

from __future__ import annotations

import torch
from torch import Tensor

from dparallel_ext.cache import bucket
from dparallel_ext.packed import COUNTING, Packing, unpack


def test_buckets() -> None:
    """Of 8, and above 64 four a doubling."""
    sizes = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    assert sorted({bucket(count) for count in range(321)}) == sizes
    assert all(bucket(count) >= count for count in range(321))


def test_number_by_number_is_as_from_tensors() -> None:
    far = len(COUNTING)
    runs = [(0, 1), (-4, 3), (far - 7, far), (far - 6, far + 1), (far, far + 500), (2**40, 2**40 + 9), (5, 5)]
    grid = torch.arange(12).view(3, 4).T
    packing, expected = Packing(), list[Tensor]()
    packing.tensors((grid, torch.zeros((0, 2), dtype=torch.int64)))
    expected += [grid, torch.zeros((0, 2), dtype=torch.int64)]
    for start, end in runs:
        packing.ascending(start, end)
        packing.repeat(start, 3)
        packing.close(end - start + 3)
        expected.append(torch.cat((torch.arange(start, end), torch.full((3,), start))))
    packing.add(iter([2**63 - 1, -(2**63), 7]))
    packing.add([8])
    packing.close(2, 2)
    expected.append(torch.tensor([[2**63 - 1, -(2**63)], [7, 8]]))
    packing.tensors((grid[1],))
    expected.append(grid[1])
    packing.close(4, 0)
    expected.append(torch.zeros((4, 0), dtype=torch.int64))
    floats = [1.0 + 2**-23, torch.inf, 0.1]
    packing.floats(floats)
    packing.close(2)
    expected.append(torch.tensor([*floats, 0.0]).view(torch.int64))
    numbers, shapes = packing.pack()
    assert numbers.dtype == torch.int64
    assert shapes == tuple(tuple(each.shape) for each in expected)
    assert torch.equal(numbers, torch.cat([each.reshape(-1) for each in expected]))
    for found, each in zip(unpack(numbers, shapes), expected, strict=True):
        assert torch.equal(found, each)
    assert Packing().pack()[0].shape == (0,)
