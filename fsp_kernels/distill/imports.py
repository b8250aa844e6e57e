"""Importing what a recipe names as ``package.module:callable``."""

from __future__ import annotations

import importlib
import operator
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from fsp_kernels.errors import DistillError, did_you_mean, explain


def find_callable(
    name: str, key: str, names: str = "package.module:callable"
) -> Callable[..., Any]:
    """The callable with this name, imported also from the current directory.

    Args:
        name: as the recipe has it.
        key: of the recipe, for messages.
        names: all that the recipe may have there, in words.

    Raises:
        DistillError: the module cannot be imported, or has no such callable.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name):
        raise DistillError(f"{key}: is {name!r}, must be {names}")
    module, _, attributes = name.partition(":")
    if os.getcwd() not in sys.path:  # a console script does not have it there
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a script may end itself
        raise DistillError(f"{key}: cannot import {module!r}: {explain(error)}") from error
    try:
        found = operator.attrgetter(attributes)(imported)
    except AttributeError as error:
        near = did_you_mean(error.name or "", dir(error.obj))
        raise DistillError(f"{key}: {module!r} has no {attributes!r}{near}") from error
    if not callable(found):
        raise DistillError(f"{key}: {name} is of type {type(found).__name__}, must be callable")
    return found
