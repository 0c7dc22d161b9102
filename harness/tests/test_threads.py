"""A model that computes in threads of its own: float64, the rounding rules and the watch go with it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from harness import Case, validate
from harness.numerics import gelu
from harness.numerics.expected_error import Rules, modes_of
from harness.tests.needs import emulated_device
from harness.torch_private import Together, in_threads

POOL = ThreadPoolExecutor(2)  # its threads start with the first work, inside of a run, and stay


def by_pool(work, parts):
    return list(POOL.map(work, parts))


def by_own_pool(work, parts):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, parts))


def by_threads(work, parts):
    results = [None] * len(parts)

    def run(place):
        results[place] = work(parts[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Parts(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.conv, self.out = way, nn.Conv2d(8, 64, 3), nn.Linear(64, 64)

    def forward(self, x):
        def work(part):
            with torch.no_grad():  # kept by thread as well
                return nn.functional.gelu(self.conv(part)).mean((2, 3))

        return self.out(torch.cat(self.way(work, x.chunk(2))))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("way", [by_pool, by_own_pool, by_threads])
def test_a_sound_model_that_computes_in_threads_passes(way, dtype):
    """HF32 convolutions and GELU's tanh formula in threads: without the rules there the floor is a thousandth of the
    error.
    """
    inputs = lambda generator: torch.randn(16, 8, 12, 12, generator=generator)
    verdict = validate(Case(name="threads", model=lambda: Parts(way), inputs=inputs, dtype=dtype), 0, emulated_device())
    assert verdict.passed, verdict.reasons


X = torch.linspace(-3, 3, 1000)


def test_the_rules_hold_in_a_thread_and_not_after_the_block():
    begin, done, results = threading.Event(), threading.Event(), []

    def outlives():
        results.append(nn.functional.gelu(X))
        begin.set()
        done.wait(30)
        results.append(nn.functional.gelu(X))

    thread = threading.Thread(target=outlives)
    with in_threads(lambda: Together(modes_of(Rules()))):
        thread.start()
        assert begin.wait(30)
    done.set()
    thread.join()
    assert torch.equal(results[0], gelu(X, "tanh"))
    assert torch.equal(results[1], nn.functional.gelu(X)), "the mode is still there and does nothing"


def test_a_pool_that_starts_in_the_block_keeps_no_mode():
    with ThreadPoolExecutor(1) as pool:
        with in_threads(lambda: Together(modes_of(Rules()))):
            assert torch.equal(pool.submit(nn.functional.gelu, X).result(), gelu(X, "tanh"))
        assert torch.equal(pool.submit(nn.functional.gelu, X).result(), nn.functional.gelu(X))


def test_modes_together_are_left_in_the_reverse_order():
    order = []

    class Mode:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            order.append(self.name)

        def __exit__(self, *raised):
            order.append(f"not {self.name}")

    with Together([Mode("one"), Mode("two")]):
        assert order == ["one", "two"]
    assert order == ["one", "two", "not two", "not one"]
