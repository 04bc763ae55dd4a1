"""What the command line prints, and when it may be more than plain text.

Colors, bold text and moving bars are escape sequences. They are written to a terminal that understands them, and
nowhere else: not to a pipe or a file, not where ``TERM=dumb``, and not where ``NO_COLOR`` is set.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "plain_text", "say"]


def console(*, stderr: bool = False) -> Console:
    """Return a console for tables and progress bars.

    Args:
        stderr: Whether it writes to standard error; otherwise to standard output.

    Returns:
        The console; one that writes plain text only where that is asked for.
    """
    from rich.console import Console

    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return Console(stderr=stderr, force_terminal=False, color_system=None)
    return Console(stderr=stderr)


def say(message: str, *, kind: str = "", style: str = "", stderr: bool = False) -> None:
    """Print a message on one line, however long it is.

    Args:
        message: The message; nothing in it is taken for markup.
        kind: What stands before it with a colon, such as ``warning``.
        style: The style of all of it, such as ``yellow``.
        stderr: Whether it goes to standard error; otherwise to standard output.
    """
    from rich.text import Text

    text = f"{kind}: {message}" if kind else message
    console(stderr=stderr).print(Text(plain_text(text), style=style), soft_wrap=True)


def plain_text(text: str) -> str:
    r"""Return text in which whatever could control a terminal is written out.

    Args:
        text: Any text, such as a name out of a file.

    Returns:
        The text, with escape sequences and the like as Python writes them.

    Example:
        >>> print(plain_text("a\x1b[31mb"))
        a\x1b[31mb
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
