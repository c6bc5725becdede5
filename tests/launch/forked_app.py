"""An app whose ranks write down what a script sees of how it was started."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import danling_conf

LOCAL_RANK = os.environ.get("LOCAL_RANK")
if os.environ.get("BROKEN_RANK", "none") == LOCAL_RANK:
    raise KeyError("this module is broken")


class Squares:
    """A data set of the script's own, which a worker that is spawned has to find again."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return index**2


@danling_conf.main()
def train(config: Any) -> None:
    import numpy
    import torch
    from torch.utils.data import DataLoader

    from danling_conf.records.current import current

    start = current()
    assert start is not None
    main = sys.modules["__main__"]
    facts = {
        "environment": LOCAL_RANK,
        "file": main.__file__,
        "package": main.__package__,
        "argv": sys.argv,
        "path": sys.path,
        "main": pickle.loads(pickle.dumps(Squares)) is main.Squares,
        "drawn": [torch.initial_seed(), float(numpy.random.rand()), random.random()],
        "parent": os.getppid(),
        "session": os.getsid(0) == os.getpid(),
        "command": Path("/proc/self/cmdline").read_text().split("\0"),
    }
    if start.ranks.main and "BROKEN_RANK" not in os.environ:  # a worker of a killed rank would stay for ever
        loader = DataLoader(Squares(), num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
        facts["loaded"] = [batch.item() for batch in loader]
    Path(config.data["folder"], f"{start.ranks.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    train()
