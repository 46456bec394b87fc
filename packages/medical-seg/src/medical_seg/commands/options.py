"""Options that more than one verb has."""

import ast
from collections.abc import Sequence
from typing import Any


def named_values(given: Sequence[str]) -> dict[str, Any]:
    """``--option NAME=VALUE``: Python literals, or words.

    Raises: ValueError for a text without a name and a value.
    """
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--option: expected NAME=VALUE such as filters=(16,32,64), got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
