"""A script as Hydra's users have them: `@hydra.main` around the runner."""

from __future__ import annotations

import os
from typing import Any

import hydra

import danling_conf


@hydra.main(version_base=None, config_name="danling")
def app(config: Any) -> None:
    if "OTHER_LR" in os.environ and os.environ.get("RANK") == "1":
        config.optim.lr = float(os.environ["OTHER_LR"])
    from tests.support.small import Net, Pairs, loss

    danling_conf.Runner(config).fit(Net, {"train": Pairs(), "val": Pairs(7, seed=1)}, loss=loss)


if __name__ == "__main__":
    app()
