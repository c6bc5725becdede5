"""Small real tasks that need no download: `build_task(name, model, data)`."""

from __future__ import annotations

from tasks.task import Task, build_task

__all__ = ["Task", "build_task"]
