"""An app with groups of its own, made by `instantiate`: before.py is Hydra's alone, after.py has danling-conf."""

import hydra
from hydra.utils import instantiate


@hydra.main(config_path="conf", config_name="before", version_base=None)
def train(cfg):
    """Train on the spirals."""
    splits = instantiate(cfg.data)
    score = instantiate(cfg.trainer).fit(instantiate(cfg.model), instantiate(cfg.optimizer), splits)
    print(f"val.loss={score:.4f}")


if __name__ == "__main__":
    train()
