"""An app that trains a tiny model for a long time, a step each fiftieth of a second.

`data.warn` makes ranks warn; `data.slow` is a rank that takes longer, `data.absent` one that does not begin.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import danling_conf
from danling_conf.records.current import current


@danling_conf.main()
def app(config: Any) -> float:
    import torch

    from tests.support.small import Net, Pairs, loss

    torch.set_num_threads(1)
    start = current()
    assert start is not None
    if config.data.get("absent") == start.ranks.rank:
        time.sleep(600)
    runner = danling_conf.Runner(config)
    runner.prepare(Net, {"train": Pairs()}, loss=loss)
    for batch in runner.batches("train"):
        runner.step(batch)
        if config.data.get("warn") and runner.global_step == 1:
            warnings.warn("of all ranks", stacklevel=1)
            logging.getLogger("mine").error("an error of all but rank 0") if start.ranks.rank else None
            warnings.warn(f"of rank {start.ranks.rank} alone", stacklevel=1)
        time.sleep(0.3 if config.data.get("slow") == start.ranks.rank else 0.02)
    return runner.finish()


if __name__ == "__main__":
    app()
