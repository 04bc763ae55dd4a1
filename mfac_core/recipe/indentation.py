"""Restore the indentation of modifier keys.

Web pages often lose it, so the keys of a modifier are at column 0. The documentation of M-FAC in SparseML is
published in this form::

    pruning_modifiers:
    - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    final_sparsity: 0.85

YAML reads these keys as keys of the whole recipe, or fails.
"""

from __future__ import annotations

import re

__all__ = ["restore_indentation"]

_ITEM = re.compile(r"\s*- !")
_BARE_ITEM = re.compile(r"(?P<indent> *)- !\S+\s*(#.*)?")
_KEY_LINE = re.compile(r"(?P<key>[^\s#:{}\[\],\"'!&*-][^#:]*):(\s|$)")


def restore_indentation(text: str) -> str:
    r"""Indent the keys at column 0 below a bare ``- !Modifier`` line, so that they belong to it.

    Such a line has no keys of its own and is followed by a ``key: value`` line at column 0. The item ends before the
    next ``- !``, before a key that cannot belong to a modifier (one that contains ``modifiers``, ``version``,
    ``__metadata__``) and at the end of the document. The number of lines stays the same.

    Example:
        >>> print(restore_indentation("training_modifiers:\n- !EpochRangeModifier\nend_epoch: 5.0"))
        training_modifiers:
        - !EpochRangeModifier
          end_epoch: 5.0
    """
    lines = text.split("\n")
    indentation = ""
    for number, line in enumerate(lines):
        bare = _BARE_ITEM.fullmatch(line)
        if bare is not None and _is_modifier_key(_next_content(lines, number + 1)):
            indentation = bare["indent"] + "  "
        elif _ends_item(line):
            indentation = ""
        elif line.strip():
            lines[number] = indentation + line
    return "\n".join(lines)


def _ends_item(line: str) -> bool:
    if _ITEM.match(line) or line.startswith(("---", "...")):
        return True
    return _KEY_LINE.match(line) is not None and not _is_modifier_key(line)


def _is_modifier_key(line: str) -> bool:
    found = _KEY_LINE.match(line)
    return found is not None and "modifiers" not in found["key"] and found["key"] not in {"version", "__metadata__"}


def _next_content(lines: list[str], start: int) -> str:
    return next((line for line in lines[start:] if line.strip() and not line.lstrip().startswith("#")), "")
