"""What a recipe names as ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from fsp_kernels.distill.errors import DistillError, did_you_mean, explain

_CALLABLE = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)")


def find_callable(
    name: str, key: str, names: str = "package.module:callable"
) -> Callable[..., Any]:
    """The callable, imported also from the current directory.

    Args:
        name: as the recipe has it.
        key: of the recipe, for messages.
        names: all that the recipe may have there, in words.

    Raises:
        DistillError: there is no such module, or nothing in it that can be called by that name.
    """
    match = _CALLABLE.fullmatch(name)
    if not match:
        raise DistillError(f"{key}: is {name!r}, must be {names}")
    module, attributes = match.groups()
    if os.getcwd() not in sys.path:  # where it is not, as in a console script
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a script may end itself
        raise DistillError(f"{key}: cannot import {module!r}: {explain(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = did_you_mean(attribute, dir(found))
            raise DistillError(f"{key}: {module!r} has no {attributes!r}{near}")
        found = getattr(found, attribute)
    if not callable(found):
        raise DistillError(f"{key}: {name} is of type {type(found).__name__}, must be callable")
    return found
