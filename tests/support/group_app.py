"""An app that trains a tiny model in replica groups, and notes a digest of every rank's weights at every step.

`data.digests` is the folder of the notes, a file a rank; `data.pause` the seconds that a step takes at least;
`data.until` a file that ends the training when it is there. The loss is a sum and its count, and batches count
differently.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import danling_conf
from danling_conf.records.current import current


@danling_conf.main()
def app(config: Any) -> float:
    import torch
    from torch import nn

    from danling_conf.parallel.replica_groups import local
    from tests.support.small import Net, Pairs

    torch.set_num_threads(1)

    def loss(output: Any, batch: Any) -> Any:
        weight = 1.0 + batch[1]
        each = nn.functional.cross_entropy(output.float(), batch[1], reduction="none")
        return (each * weight).sum(), weight.sum()

    class Digests(danling_conf.Callback):
        def on_step_end(self, runner: Any) -> None:
            started = current()
            assert started is not None
            digest = hashlib.sha256()
            for parameter in runner.model.parameters():
                values = [parameter, *(v for v in runner.optimizer.state[parameter].values() if torch.is_tensor(v))]
                for value in values:
                    digest.update(local(value.detach()).contiguous().numpy().tobytes())
            number = started.ranks.number
            line = {
                "step": runner.global_step,
                "time": time.time(),
                "rank": number % started.ranks.world_size,
                "digest": digest.hexdigest()[:16],
                "epoch": runner.epoch,
                "seed": torch.initial_seed(),
                "lr": runner.optimizer.param_groups[0]["lr"],
            }
            with open(Path(config.data["digests"]) / f"{number}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            time.sleep(config.data.get("pause", 0.0))
            if "until" in config.data and Path(config.data["until"]).exists():
                runner.stop("it is enough")

    callbacks = [Digests()] if "digests" in config.data else []
    runner = danling_conf.Runner(config)
    score = runner.fit(Net, {"train": Pairs(96), "val": Pairs(24, seed=1)}, loss=loss, callbacks=callbacks)
    if "weights" in config.data and runner.world.ranks.main:
        torch.save(dict(runner.results), config.data["weights"])
    return score


if __name__ == "__main__":
    app()
