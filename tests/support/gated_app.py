"""An app for sweeps whose jobs do what `data.do` says: fail, or wait, until the file `data.gate` is there."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import danling_conf


@danling_conf.main()
def app(config: Any) -> Any:
    gate, do = Path(config.data["gate"]), config.data.get("do", "nothing")
    logging.getLogger(__name__).info("this is lr=%s", config.optim.lr)
    if do == "fail" and not gate.exists():
        raise RuntimeError("the gate is shut")
    while do == "wait" and not gate.exists():
        time.sleep(0.05)
    return config.optim.lr


if __name__ == "__main__":
    app()
