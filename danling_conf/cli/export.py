"""`danling-conf export`: the weights of a run or a checkpoint as safetensors, without the run's processes."""

from __future__ import annotations

import sys
from pathlib import Path

from danling_conf.checkpoint.manifest import Broken
from danling_conf.records.status import EXIT_FAILED
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError, Violation


def export(source: str, directory: str, *, best: bool, dtype: str | None) -> int:
    """Write the export and say what it is; returns the exit code.

    Args:
        source: a run's directory or a checkpoint's.
        directory: the folder to write, which must not exist or be empty.
        best: the run's best checkpoint in place of its newest.
        dtype: to cast to; None leaves tensors as trained.

    Raises ConfigRefused where there is nothing to export, or something in the directory already.
    """
    # Here, since it imports torch, which no other command needs.
    from danling_conf.checkpoint.convert import convert
    from danling_conf.checkpoint.weight_sources import NothingSaved

    try:
        written = convert(Path(source).expanduser(), Path(directory).expanduser(), best=best, dtype=dtype)
    except Broken as error:
        print(f"broken: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        print(f"failed: {directory}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    except NothingSaved as error:
        raise ConfigRefused(
            [Violation("SOURCE", source, str(error), "name a run's directory or a checkpoint's")]
        ) from error
    except SettingError as error:
        raise ConfigRefused([error.violation]) from error
    except ImportError as error:
        raise ConfigRefused([Violation("export", ABSENT, str(error), "pip install safetensors")]) from error
    print("\n".join(written.lines()))
    return 0
