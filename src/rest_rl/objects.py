"""What a user may replace, named `package.module:OBJECT`; packages that are called like their workflow."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rest_rl.errors import UserError

_search_folders: list[str] = []


def add_search_folder(folder: str | Path) -> None:
    """Look for users' modules in this folder too; a run file's own folder is one, so that a rule can lie beside it."""
    path = str(Path(folder).resolve())
    if path not in _search_folders:
        _search_folders.append(path)


def load_object(address: str, what: str) -> Any:
    """The object at `package.module:OBJECT`; `what` names its use in the error ("format", "weight rule").

    The Python path is searched first, then the current directory and the folders of `add_search_folder`.

    Raises:
        UserError: there is no such module or object, or importing it failed.
    """
    module, separator, path = address.partition(":")
    if not separator or not module or not path:
        raise UserError(f"{what} {address!r}", "package.module:OBJECT", "write the module, a colon and the object")
    for folder in (str(Path.cwd()), *_search_folders):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        found: Any = importlib.import_module(module)
        if other := _find_conflicting_file(module, getattr(found, "__file__", None)):
            raise UserError(
                f"{what} {address!r}, of which there are two: {found.__file__} and {other}",
                "one module of that name in a Python process",
                "rename one of them",
            )
        for part in path.split("."):
            found = getattr(found, part)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the module is the user's, and so is whatever it raises
        raise UserError(
            f"{what} {address!r}, which cannot be imported ({type(error).__name__}: {error})",
            "package.module:OBJECT in the current directory, beside the run file or on the Python path",
            "correct the name, or set PYTHONPATH",
        ) from error
    return found


def _find_conflicting_file(module: str, file: str | None) -> Path | None:
    """A file in the search folders that the module's name stands for, too, and that says something else."""
    beside = (Path(folder, *module.split(".")).with_suffix(".py") for folder in _search_folders)
    others = (path for path in beside if file and path.is_file() and not path.samefile(file))
    return next((path for path in others if path.read_bytes() != Path(str(file)).read_bytes()), None)


def find_address(found: object) -> str | None:
    """The `package.module:OBJECT` at which a loaded module holds the object; `__main__` has no other name."""
    for module in [name for name in sys.modules if name != "__main__"]:
        for name, value in list(vars(sys.modules[module] or object).items()):
            if value is found and not name.startswith("_"):
                return f"{module}:{name}"
    return None


def check_signature(function: Callable[..., Any], what: str, *parameters: str) -> None:
    """UserError for a user's function that cannot be called with these parameters by position."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise UserError(
            f"{what}, which cannot be called with ({', '.join(parameters)}): {error}", "these", "correct its parameters"
        ) from None
    except ValueError:  # a function in C that does not tell
        return


@contextmanager
def wrap_user_errors(what: str, expected: str) -> Iterator[None]:
    """Around the first calls of a user's object: UserError for whatever it raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        got = f"{what}, which fails when it is tried ({type(error).__name__}: {error})"
        raise UserError(got, expected, "correct it; --debug shows where") from error


class UserObject:
    """A user's callable with the address and the options that it was made from; it behaves as the object itself."""

    def __init__(self, address: str, what: str, options: Mapping[str, Any]) -> None:
        """Import the object; a class is called with the options.

        Raises:
            UserError: it cannot be imported, does not take these options, or cannot be called.
        """
        self.address, self.options = address, dict(options)
        target = load_object(address, what)
        if isinstance(target, type):
            try:
                target = target(**options)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{what} {address!r} with {dict(options)} ({error})", f"options of {address}", "change them"
                ) from error
        elif options:
            raise UserError(
                f"{what} {address!r} with the options {', '.join(options)}",
                "none, because it is no class that takes options",
                "remove them, or name a class",
            )
        if not callable(target):
            raise UserError(
                f"{what} {address!r}, which is a {type(target).__name__}", "something to call", "name a function"
            )
        self.target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "target" or name.startswith("__"):  # before __init__ has run, as in a copy
            raise AttributeError(name)
        return getattr(self.target, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserObject) and (self.address, self.options) == (other.address, other.options)

    def __hash__(self) -> int:
        return hash(self.address)


def display_name(found: object) -> str:
    """What an error calls a user's object: its address, or its own name."""
    return getattr(found, "address", None) or getattr(found, "__name__", type(found).__name__)


def make_package_callable(package: str, workflow: str) -> None:
    """Let `rest_rl.train(...)` call the function at `workflow` ("rest_rl.train.run:train"), imported at the first call.

    The package `rest_rl.train` stays a package: its modules are imported as usual.
    """

    def load() -> Callable[..., Any]:
        module, _, name = workflow.partition(":")
        return getattr(importlib.import_module(module), name)

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return load()(*args, **kwargs)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(load())

    sys.modules[package].__class__ = CallablePackage
