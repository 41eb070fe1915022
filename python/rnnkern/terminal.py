"""Lines on stdout, and one that follows the work; rich draws it where it is installed."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

__all__ = ["Terminal", "stdout_is_a_terminal"]

PLAIN_INTERVAL = 5.0  # seconds between progress lines where they cannot replace each other


def stdout_is_a_terminal() -> bool:
    """Whether stdout is one; it may also be closed, None in a process without a console, or an object of the caller."""
    try:
        return bool(sys.stdout.isatty())
    except (AttributeError, ValueError):
        return False


class Terminal:
    """Lines on stdout and one that follows the work: by rich or a carriage return on a terminal, else now and then.

    Where stdout fails, as `| head -1` lets it, the work goes on unseen.
    """

    def __init__(self) -> None:
        self._interactive = stdout_is_a_terminal()
        self._live = _rich_live() if self._interactive else None
        self._shown = -math.inf  # when a progress line was last written
        self._width = 0  # of the progress line on the screen
        self._lost = False  # whether stdout has failed

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._clear()

    def say(self, text: str = "") -> None:
        """Write lines that stay."""
        self._clear()
        self._write(f"{text}\n")

    def progress(self, text: str) -> None:
        """Show one line in place of the last one."""
        now = time.monotonic()
        if now - self._shown < (0.1 if self._interactive else PLAIN_INTERVAL):
            return
        self._shown = now
        if self._live is not None:
            self._live.start()
            self._live.update(self._live.console.render_str(text, markup=False), refresh=True)
        elif self._interactive:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be replaced
            self._write(f"\r{text:<{self._width}}")
            self._width = len(text)
        else:
            self._write(f"{text}\n")

    def _clear(self) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._width:
            self._write(f"\r{'':<{self._width}}\r")
            self._width = 0

    def _write(self, text: str) -> None:
        if self._lost:
            return
        try:
            print(text, end="", flush=True)
        except UnicodeEncodeError:  # a ValueError too, and no sign that stdout is closed
            raise
        except (OSError, ValueError):  # the latter where it is closed
            self._lost = True


def _rich_live() -> Any:
    """rich's live display without its thread, which would take time from the training; None without rich."""
    try:
        from rich.live import Live
    except ImportError:
        return None
    return Live(auto_refresh=False, transient=True)
