"""Whose: the package in which a class, a function or an object was written."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

KNOWN = ("torch", "transformers", "hf_cuttlefish")
"""Packages whose modules do the same in each step."""
LIBRARIES = (
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "tqdm",
    "typing_extensions",
    "packaging",
    "numpy",
    "regex",
    "yaml",
)
"""From which files of transformers and torch import functions, beside Python's own."""


def is_of(what: Any, packages: Iterable[str] = KNOWN) -> bool:
    """Whether it was written in these packages, and all that it wraps too.

        is_of(transformers.Trainer.compute_loss)  # True, until somebody replaces it

    A function says where it was written by its globals: `functools.wraps` copies its name and its module from another.
    """
    if isinstance(what, functools.partial):
        return is_of(what.func, packages)
    if isinstance(what, MethodType | staticmethod | classmethod):
        return is_of(what.__func__, packages)
    if isinstance(what, property):
        return all(is_of(part, packages) for part in (what.fget, what.fset, what.fdel) if part is not None)
    if isinstance(what, BuiltinFunctionType):  # torch.tanh
        return True
    if package_of(what) not in (*packages, "contextlib"):  # its decorators are around a function of somebody's
        return False
    return not isinstance(what, FunctionType) or not hasattr(what, "__wrapped__") or is_of(what.__wrapped__, packages)


def package_of(what: Any) -> str:
    """Of a function, by its globals; of a class; or of an object's class.

    package_of(torch.nn.functional.gelu)  # "torch"
    """
    if isinstance(what, FunctionType):
        return _package(what.__globals__.get("__name__"))
    return _package((what if isinstance(what, type) else type(what)).__module__)


def are_as_written(kinds: Iterable[type]) -> bool:
    """Whether all functions of these classes, of those that they inherit from, and of the files they stand in, are of known packages.

    are_as_written({type(m) for m in model.modules()})  # False where somebody has replaced a forward, or a function in a file
    """
    also = {*KNOWN, *LIBRARIES, *sys.stdlib_module_names}
    classes = {cls for kind in kinds for cls in kind.__mro__[:-1]}
    files = {cls.__module__ for cls in classes}
    if not all(_package(file) in also for file in files):
        return False
    held = [value for cls in classes for value in vars(cls).values() if isinstance(value, _FUNCTIONS)]
    for file in files & sys.modules.keys():
        held += [value for value in vars(sys.modules[file]).values() if isinstance(value, FunctionType)]
    return all(is_of(value, also) for value in held)


_FUNCTIONS = (FunctionType, MethodType, property, staticmethod, classmethod, functools.partial)


def _package(module: Any) -> str:
    return str(module).partition(".")[0]
