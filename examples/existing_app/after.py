"""An app with groups of its own, made by `instantiate`: before.py is Hydra's alone, after.py has danling-conf."""

from hydra.utils import instantiate
from torch.nn.functional import cross_entropy

import danling_conf


@danling_conf.main(config_path="conf", config_name="after")
def train(cfg):
    """Train on the spirals."""
    splits = instantiate(cfg.data)
    runner = danling_conf.Runner(cfg)
    return runner.fit(lambda: instantiate(cfg.model), splits, loss=lambda found, batch: cross_entropy(found, batch[1]))


if __name__ == "__main__":
    train()
