"""An app with one flat file, as many are: settings are read by attribute."""

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="conf", config_name="config", version_base=None)
def train(cfg: DictConfig) -> None:
    print(f"flat lr={cfg.lr} hidden={cfg.hidden} tags={list(cfg.tags)}")


if __name__ == "__main__":
    train()
