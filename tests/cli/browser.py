"""A page in a real browser: headless Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
REQUIRED = os.environ.get("DANLING_REQUIRE_BROWSER") == "1"


def chromium() -> str:
    """The browser's program. Skips the test where there is none; fails where DANLING_REQUIRE_BROWSER=1."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        (pytest.fail if REQUIRED else pytest.skip)("no Chromium here: apt-get install chromium")
    assert found is not None
    return found


def _run(folder: Path, *given: str) -> str:
    profile = folder / "browser"
    words = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=2000", *given]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    faults = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not faults, faults  # an error of the script, something that was blocked
    return done.stdout


def dom_of(page: Path | str, folder: Path, *arguments: str, dark: bool = False) -> str:
    """The document of a file or an address after its scripts have run."""
    address = page if isinstance(page, str) else page.as_uri()
    return _run(folder, "--dump-dom", *(_DARK if dark else ()), *arguments, address)


def picture_of(page: Path, folder: Path, *, width: int, height: int, dark: bool = False) -> bytes:
    """A screenshot, PNG."""
    target = folder / f"page-{width}-{dark}.png"
    _run(folder, f"--screenshot={target}", f"--window-size={width},{height}", *(_DARK if dark else ()), page.as_uri())
    return target.read_bytes()
