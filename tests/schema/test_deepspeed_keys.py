"""Tables of DeepSpeed's keys against the installed package, read from its source: importing it takes seconds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from danling_conf.schema.deepspeed import DERIVED, ROOT_KEYS, SAID_ELSEWHERE, ZERO_KEYS, ZERO_SAID_ELSEWHERE
from danling_conf.topology.machine import this_machine
from tests.support.commands import REPOSITORY, environment

INSIDE = {"dtype", "lower_precision_safe_modules"}
"""Of `torch_autocast`."""
OURS = {"stage", "offload_optimizer", "offload_param"}


def package() -> Path:
    found = find_spec("deepspeed")
    assert found is not None, "the extra `test` of pyproject.toml installs it"
    assert found.origin is not None
    return Path(found.origin).parent


def test_every_key_of_zero_is_known_and_no_other() -> None:
    tree = ast.parse((package() / "runtime" / "zero" / "config.py").read_text())
    (section,) = (item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == "DeepSpeedZeroConfig")
    theirs = set()
    for item in section.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            keywords = item.value.keywords if isinstance(item.value, ast.Call) else []
            alias = [ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == "alias"]
            theirs.add(alias[0] if alias else item.target.id)
    assert theirs == {*ZERO_KEYS, *ZERO_SAID_ELSEWHERE, *OURS}
    assert not ZERO_KEYS.keys() & ZERO_SAID_ELSEWHERE.keys()


def test_every_key_at_the_root_is_known_and_no_other() -> None:
    text = "\n".join(path.read_text() for path in package().rglob("*.py"))
    ours = {*ROOT_KEYS, *DERIVED, *SAID_ELSEWHERE}
    assert {key for key in ours if f'"{key}"' not in text and f"'{key}'" not in text} == set()
    assert read_at_the_root() - {*ours, "zero_optimization"} == set()


def read_at_the_root() -> set[str]:
    """The keys that its `runtime/config.py` reads of its configuration."""
    names: dict[str, str] = {}
    for path in [package() / "runtime" / "config.py", *package().rglob("constants.py")]:
        for item in ast.parse(path.read_text()).body:
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
                names |= {target.id: item.value.value for target in item.targets if isinstance(target, ast.Name)}
    source = (package() / "runtime" / "config.py").read_text()
    constants = re.findall(r"(?:param_dict(?:\.get\(|\[)|get_scalar_param\(\s*param_dict,\s*)([A-Z_]+)", source)
    words = re.findall(r"""param_dict(?:\.get\(|\[)['"](\w+)""", source)
    found = {*words, *(str(names[name]) for name in constants if name in names)}
    assert len(found) > 20
    return found - INSIDE


WITHOUT = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "deepspeed" else found(name, *rest)
script = sys.argv[1]
sys.argv = [script, "deepspeed=zero2", "steps=1"]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_without_the_package_one_sentence_before_torch_is_imported(tmp_path: Path) -> None:
    script = str(REPOSITORY / "examples" / "train.py")
    command = [sys.executable, "-c", WITHOUT, script]
    done = subprocess.run(
        command, env=environment({}), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "the package deepspeed is not installed" in done.stdout + done.stderr
    assert "pip install danling-conf[deepspeed]" in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "False"
    assert this_machine({}).deepspeed
