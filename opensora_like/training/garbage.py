"""Decides when Python looks for cyclic garbage, so that no rank does so alone while the others wait for it."""

from __future__ import annotations

import gc


class GarbageControl:
    """Collects after every `every` updates, on all ranks after the same one.

    Left to itself Python collects when a process has made enough objects, which ranks reach at different times; each
    pause then stops all of them at the next collective. What is alive at the beginning is not looked at again.

    Args:
        every: updates; 0 leaves it to Python.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, every: int) -> None:
        if every < 0:
            raise ValueError(f"gc_every={every} must be a number of updates, or 0 to leave it to Python")
        self._every, self._was_enabled = every, gc.isenabled()
        if every:
            gc.collect()
            gc.freeze()
            gc.disable()

    def after_step(self, step: int) -> None:
        """Collect if it is due after update number `step`."""
        if self._every and step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Leave it to Python again."""
        if self._every:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
