"""An app with groups and `_target_`s everywhere, and a callback of Hydra."""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.utils import instantiate

import danling_conf


class Note(Callback):
    """Writes down when Hydra calls it."""

    def _note(self, name):
        with Path(os.environ["NOTES"]).open("a") as notes:
            notes.write(f"{name}\n")

    def on_run_start(self, config, **kwargs):
        self._note("run_start")

    def on_run_end(self, config, job_return=None, **kwargs):
        self._note("run_end")

    def on_job_start(self, config, **kwargs):
        self._note("job_start")

    def on_job_end(self, config, job_return=None, **kwargs):
        self._note("job_end")

    def on_multirun_start(self, config, **kwargs):
        self._note("multirun_start")

    def on_multirun_end(self, config, **kwargs):
        self._note("multirun_end")


class EarlyStopping:
    """A callback of some other trainer."""

    def __init__(self, monitor, patience):
        self.rule = f"{monitor} for {patience}"


@danling_conf.main(config_path="conf", config_name="train")
def train(cfg):
    hydra = HydraConfig.get()
    made = [instantiate(item) for item in (cfg.model, cfg.trainer, cfg.data, cfg.logger)]
    print("made", made[0]["net"], made[1]["max_epochs"], made[2]["transforms"])
    stopping = [instantiate(item).rule for item in (cfg.get("callbacks") or {}).values() if item]
    print("stopping", *stopping, cfg.get("nothing", "else"), "tags" in cfg, cfg["task_name"])
    print("output", hydra.runtime.output_dir, cfg.paths.output_dir == cfg.logger.csv.save_dir, Path.cwd())
    print("job", hydra.job.name, hydra.mode.name, os.environ.get("SET_BY_HYDRA"), cfg.paths.output_dir)
    return float(cfg.model.width)


if __name__ == "__main__":
    train()
