"""How ranks agree on signals: about once a second, and at one step."""

from __future__ import annotations

import pytest
import torch.distributed as distributed

from danling_conf.runner.signals import StopRequest
from tests.support.spawn import shared


def agreed(noted_at: int) -> tuple[int, int, int]:
    """The step at which this rank learns of a signal that rank 1 notes, the answer, and how often ranks asked."""
    asked = []
    reduce = distributed.all_reduce

    def counted(*given: object, **options: object) -> object:
        asked.append(given)
        return reduce(*given, **options)

    request = StopRequest()
    request.install()
    distributed.all_reduce = counted
    try:
        step = number = 0
        while not number:
            step += 1
            if step == noted_at and distributed.get_rank() == 1:
                request.number = 15
            number = request.signal_on_any_rank()
    finally:
        distributed.all_reduce = reduce
        request.remove(failing=False)
    return step, number, len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("noted_at", [2, 100, 2000])
def test_ranks_ask_seldom_and_stop_together(noted_at: int) -> None:
    first, second = shared(agreed, 2, noted_at)
    assert first == second
    step, number, asked = first
    assert number == 15
    assert noted_at < step <= noted_at + 2 + min(64, step // 8)
    assert noted_at < 2000 or asked < step / 8
