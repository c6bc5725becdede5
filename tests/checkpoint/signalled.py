"""An app that trains slowly, says when it does, and hangs where it is told to: for tests of signals.

`data.gate` is a file for which rank 1 waits in its third step; `THREADS` in the environment is how many more threads
the command has.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import danling_conf


@danling_conf.main()
def app(config: Any) -> float:
    import torch

    from tests.support.small import DropoutNet, Pairs, loss

    torch.set_num_threads(1)
    runner = danling_conf.Runner(config)
    runner.prepare(DropoutNet, {"train": Pairs()}, loss=loss)
    rank = runner.world.ranks.rank
    for batch in runner.batches("train"):
        runner.step(batch)
        if runner.global_step == 3:
            written = Path(config.data["ranks"], f".{rank}")
            written.write_text(f'{{"rank": {rank}, "pid": {os.getpid()}}}')
            written.rename(written.with_name(f"rank-{rank}.json"))
            while rank == 1 and "gate" in config.data and not Path(config.data["gate"]).exists():
                time.sleep(0.02)
            if config.data.get("hang"):
                time.sleep(600)
        time.sleep(0.02)
    return runner.finish()


if __name__ == "__main__":
    for _ in range(0 if "RANK" in os.environ else int(os.environ.get("THREADS", "0"))):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    app()
