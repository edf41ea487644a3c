"""The order of every epoch equals the stock sampler's, whichever epoch a process starts with."""

from __future__ import annotations

import pytest
from trl.trainer.utils import RepeatSampler

from rest_rl.train.trl.trainer import EpochOrder


def stock() -> RepeatSampler:
    return RepeatSampler(range(10), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=7)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_order_equals_the_stock_samplers_from_any_epoch(first: int) -> None:
    sampler = stock()
    orders = [list(sampler) for _ in range(5)]
    resumed = EpochOrder(stock())
    assert len(resumed) == len(orders[0])
    for epoch in range(first, 5):
        resumed.set_epoch(epoch)
        resumed.set_epoch(epoch)  # some versions of the trainer call it twice
        assert list(resumed) == orders[epoch]
    assert orders[0] != orders[1]
