from __future__ import annotations

from typing import Any

import pytest

from prism_megatron.training.gradient_overlap import reduce_in_order


class Bucket:
    """What reduce_in_order uses of megatron.core's bucket group."""

    def __init__(self, name: str, params: str, started: list[str]) -> None:
        self.name, self.params, self.started = name, set(params), started
        self.is_last_microbatch = True
        self.grad_reduce_handle: object = None

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        assert self.grad_reduce_handle is None
        self.started.append(self.name)
        self.grad_reduce_handle = object()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        if self.grad_reduce_handle is None:
            self.start_grad_sync()
        self.grad_reduce_handle = None


def _buckets() -> tuple[list[Any], list[str]]:
    started: list[str] = []
    buckets: list[Any] = [Bucket(n, n, started) for n in ("ab", "c", "de")]
    reduce_in_order(buckets)
    return buckets, started


def _backward(buckets: list[Any], order: str) -> None:
    for parameter in order:
        next(b for b in buckets if parameter in b.params).register_grad_ready(parameter, False)


@pytest.mark.parametrize("order", ["abcde", "edcba", "cabed", "dce", "", "ca", "bde"])
def test_the_order_is_the_same_whichever_gradients_came(order: str) -> None:
    buckets, started = _buckets()
    for _ in range(3):
        _backward(buckets, order)
        for bucket in buckets:
            bucket.finish_grad_sync()
        assert started == ["ab", "c", "de"]
        started.clear()


def test_a_bucket_starts_in_the_backward_pass_once_those_before_it_have() -> None:
    buckets, started = _buckets()
    _backward(buckets, "cde")
    assert started == []
    _backward(buckets, "b")
    assert started == []
    _backward(buckets, "a")
    assert started == ["ab", "c", "de"]


def test_gradients_of_earlier_micro_batches_start_nothing() -> None:
    buckets, started = _buckets()
    for bucket in buckets:
        bucket.is_last_microbatch = False
    _backward(buckets, "abcde")
    assert started == []
    for bucket in buckets:
        bucket.is_last_microbatch = True
    _backward(buckets, "ab")
    assert started == ["ab"]
