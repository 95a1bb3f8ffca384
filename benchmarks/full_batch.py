"""A full batch of N references and as many negatives, against CEBRA's and a bare ``sum(exp)``."""

import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import jax

from benchmarks.limit import bare_sum, unit_rows
from benchmarks.measure import Comparison, peak_memory, run_python, seconds, warm
from cebra_jax_metrics import infonce

WIDTH = 8
MEMORY_LIMIT = 2**34  # bytes that CEBRA may ask for


def ours(number: str) -> None:
    """The loss of all embeddings against all."""
    _once(_infonce, unit_rows(int(number), WIDTH))


_infonce = jax.jit(infonce)


def gradient(number: str) -> None:
    """Loss and gradient of one large batch."""
    _once(_gradient, unit_rows(int(number), WIDTH))


_gradient = jax.jit(jax.value_and_grad(lambda *rows: infonce(*rows).loss, argnums=(0, 1, 2)))


def theirs(number: str) -> None:
    """CEBRA's criterion on embeddings of the same kind, as its metric evaluates it."""
    import resource

    import numpy as np
    import torch
    from cebra.models.criterions import FixedCosineInfoNCE

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    rows = torch.nn.functional.normalize(
        torch.tensor(np.random.default_rng(0).normal(size=(int(number), WIDTH)).astype(np.float32))
    )
    criterion = FixedCosineInfoNCE()
    with torch.no_grad():
        criterion(rows, rows, rows)
        print("seconds", seconds(lambda: criterion(rows, rows, rows)))


def _once(function: Callable[..., object], rows: jax.Array) -> object:
    return jax.block_until_ready(function(rows, rows, rows))


def cebra_times(number: int) -> list[float]:
    """Seconds that CEBRA takes; none where its memory is not enough."""
    script = f"from benchmarks.full_batch import theirs; theirs('{number}')"
    try:
        return [float(run_python("-c", script).split()[-1])]
    except subprocess.CalledProcessError:
        return []


def run(quick: bool) -> list[Comparison]:
    """Growing numbers of references."""
    return [*_compared((1_000,) if quick else (5_000, 10_000, 20_000, 50_000, 100_000), quick)]


def _compared(numbers: tuple[int, ...], quick: bool) -> Iterator[Comparison]:
    for number in numbers:
        rows = unit_rows(number, WIDTH)
        case = f"full batch of {number}, d = {WIDTH}"
        repeats = 3 if number < 50_000 else 1
        times = [warm(partial(_once, _infonce, rows), repeats)]
        memory = peak_memory("benchmarks.full_batch:ours", number)
        yield Comparison(case, "CEBRA 0.6.1", times, cebra_times(number), our_memory=memory)
        limit = [warm(bare_sum(number**2), repeats)]
        yield Comparison(case, "bare sum(exp)", times, limit, our_memory=memory)
    number = 2_048 if quick else 65_536
    rows = unit_rows(number, WIDTH)
    yield Comparison(
        f"loss and gradient of a batch of {number}, d = {WIDTH}",
        "bare sum(exp)",
        [warm(partial(_once, _gradient, rows), 1)],
        [warm(bare_sum(number**2), 1)],
        our_memory=peak_memory("benchmarks.full_batch:gradient", number),
    )
