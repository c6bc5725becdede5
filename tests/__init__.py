"""Tests of danling-conf.

Nothing but the package is importable after an install. Tests, and the processes that they start, also import `tests`
and what lies beside the scripts of the examples (`models`, `tasks`): both folders are put on the path here, once.
"""

import os
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).parents[1]
_FOLDERS = [str(_REPOSITORY), str(_REPOSITORY / "examples")]

sys.path += [folder for folder in _FOLDERS if folder not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys([*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *_FOLDERS])
)
