"""Warm process of local ranks: imports once what each of them needs, and forks them.

The import takes two to three seconds of CPU time, which ranks that are forked do not pay again. Nothing of the user's
runs here: what a script does when it is imported (read LOCAL_RANK, start threads, open a device) it does in each rank,
where it is the main module as if Python had started it.

`launch.forked` runs this file by its path: the package may be found through a path that the script itself adds.
"""

from __future__ import annotations

import builtins
import gc
import io
import json
import os
import socket
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

CHANNEL_VARIABLE = "DANLING_CONF_WARM"
"""Environment variable that holds the descriptor of the socket to the command."""
REFUSED = "no"
"""Begins a line that says why ranks cannot be forked, in place of their process ids."""
# Names alone, since the launcher uses nothing of the runner: what a rank of ours imports anyway.
_IMPORTED = ("torch.distributed", "danling_conf.command", "danling_conf.launch.rank", "danling_conf.runner.training")


def main() -> None:
    """Fork the ranks and end; in each of them, run the script or module that the command line names."""
    words = sys.argv[1:]
    channel = socket.socket(fileno=int(os.environ.pop(CHANNEL_VARIABLE)))
    line = channel.makefile("rb").readline()
    if not line.endswith(b"\n"):
        os._exit(1)  # the command is gone
    plan = json.loads(line)
    found_in = _become(words)
    refused = _import(plan["path"], found_in) or _threads_left()
    if refused is None:
        gc.freeze()  # a collection would write to, and so copy, every page that the ranks share
        try:
            for rank in plan["ranks"]:
                pid = os.fork()
                if pid == 0:
                    _begin(channel, rank, plan["ranks"])
                    _run(words)
                    return
                _tell(channel, str(pid))
        except BlockingIOError as error:
            refused = f"{error.strerror} (fork)"
    if refused is not None:
        _tell(channel, f"{REFUSED} {refused}")
    os._exit(0)  # nothing of what was imported has to be put away, and the ranks wait for this


def _tell(channel: socket.socket, line: str) -> None:
    try:
        channel.sendall(f"{line}\n".encode())
    except ConnectionError:
        os._exit(1)  # the command is gone


def _become(words: list[str]) -> str:
    """Set what a module can see of how Python was started as it is in a rank. Returns the folder that comes first in
    its `sys.path`."""
    main_module = ModuleType("__main__")
    vars(main_module)["__builtins__"] = builtins
    sys.modules["__main__"] = main_module
    sys.orig_argv = [sys.orig_argv[0], "-u", *words]
    if words[0] == "-m":
        sys.argv, first = ["-m", *words[2:]], os.getcwd()
    else:
        sys.argv, first = words, os.path.dirname(os.path.realpath(words[0]))
        vars(main_module).update(__file__=words[0], __cached__=None, __loader__=SourceFileLoader("__main__", words[0]))
    if not sys.flags.safe_path:
        sys.path[0] = first
    return first


def _import(path: list[str], first: str) -> str | None:
    """Import what ranks need, from where the command found it. Returns why that did not do; None where it did."""
    package = Path(__file__).parents[1]
    spec = PathFinder.find_spec(package.name, [str(package.parent)])
    assert spec is not None
    assert spec.loader is not None
    own_path = sys.path[:]
    # The script may have added folders by the time that it called the command.
    sys.path[:] = path
    try:
        sys.modules[package.name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        from danling_conf.schema.imports import import_large

        for name in _IMPORTED:
            import_large(name)
    except Exception as error:  # a rank will say more
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        sys.path[:] = own_path
    # A module of the script's that has the name of one that torch imports: it has run without a rank.
    users = {first, *path} - {*own_path[1:], str(package.parent)}
    for name in sys.modules.keys() - {"__main__", "__mp_main__", package.name}:
        file = getattr(sys.modules[name], "__file__", None) if "." not in name else None
        if file and {os.path.dirname(file), os.path.dirname(os.path.dirname(file))} & users:
            return f"{file} takes the place of a module"
    return None


def _threads_left() -> str | None:
    """Why threads make it unsafe to fork; None where there is only one."""
    if _threads() > 1:
        # Libraries that expect to be forked (OpenBLAS) put their threads away when it happens.
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    count = _threads()
    return None if count == 1 else f"what was imported runs in {count} threads"


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _begin(channel: socket.socket, rank: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """In a forked process: wait for the command's word, then become a rank. Ends where the command is gone or gave
    up."""
    os.setsid()
    try:
        told = channel.recv(1)
    except OSError:
        told = b""
    if not told:
        os._exit(1)
    channel.close()
    if rank["output"] is not None:
        os.dup2(rank["output"], 1)
        os.dup2(rank["output"], 2)
    for other in ranks:
        for descriptor in (other["output"], other["passed"]):
            if descriptor is not None and descriptor != rank["passed"]:
                os.close(descriptor)
    os.environ.update(rank["environment"])
    _draw_anew()


def _draw_anew() -> None:
    """Seed what was seeded at random when it was imported, and would be the same in all ranks. `random` does so by
    itself."""
    from multiprocessing import current_process

    sys.modules["torch"].default_generator.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    current_process().authkey = os.urandom(32)


def _run(words: list[str]) -> None:
    """Run the script or module as the main module, and end as Python would."""
    try:
        if words[0] == "-m":
            import runpy

            runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]  # what `python -m` itself calls
        else:
            with io.open_code(words[0]) as file:
                code = compile(file.read(), words[0], "exec", dont_inherit=True)
            exec(code, vars(sys.modules["__main__"]))
    except SystemExit:
        raise
    except BaseException:
        shown = sys.excepthook

        def without_this_file(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            shown(kind, error.with_traceback(trace), trace)

        sys.excepthook = without_this_file
        raise


if __name__ == "__main__":
    main()
