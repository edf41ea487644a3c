"""Loads users' objects by `package.module:OBJECT`, and makes packages such as `rest_rl.train` callable."""

from __future__ import annotations

import importlib
import importlib.util
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
    """Add a folder in which `load_object` looks for modules, such as the folder of the run file."""
    path = str(Path(folder).resolve())
    if path not in _search_folders:
        _search_folders.append(path)


def load_object(address: str, what: str) -> Any:
    """Import the object at `package.module:OBJECT` or `path/to/file.py:OBJECT`.

    Searches a module on the Python path first, then in the current directory and the folders of `add_search_folder`.
    A file is searched for only in the latter; it can import the modules next to it.

    Args:
        address: Module and object, separated by a colon.
        what: The object's role in error messages, such as "weight rule".

    Raises:
        UserError: There is no such module or object, or its import fails.
    """
    module, separator, path = address.rpartition(":")
    if not separator or not module or not path:
        raise UserError(f"{what} is {address!r}", "package.module:OBJECT or path/to/file.py:OBJECT", "correct the name")
    # The folders are appended, never put first: a user's random.py must not hide the standard library's.
    for folder in (str(Path.cwd()), *_search_folders):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        found: Any = _import_file(module) if module.endswith(".py") else importlib.import_module(module)
        if other := _find_conflicting_file(module, getattr(found, "__file__", None)):
            problem = f"{what} {address!r} is ambiguous: {found.__file__} and {other} are different modules"
            raise UserError(problem, remedy="rename one of them")
        for part in path.split("."):
            found = getattr(found, part)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's module can raise anything
        raise UserError(
            f"cannot import {what} {address!r} ({type(error).__name__}: {error})",
            "a module or a file in the current directory, next to the run file or on the Python path",
            "correct the name, or set PYTHONPATH",
        ) from error
    return found


# The module is named after the path of its file, so its name never collides with that of another module.
def _import_file(file: str) -> ModuleType:
    found = (path for folder in (Path.cwd(), *_search_folders) if (path := Path(folder, file)).is_file())
    path = next(found, None)
    if path is None:
        raise FileNotFoundError(f"there is no file {file}")
    path = path.resolve()
    if (name := str(path)) not in sys.modules:
        sys.path.extend({str(path.parent)} - set(sys.path))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _find_conflicting_file(module: str, file: str | None) -> Path | None:
    # Python imports a module of a given name once per process. If two run folders have different modules of the same
    # name, the second one would silently get the first one's object; identical copies do no harm.
    candidates = (Path(folder, *module.split(".")).with_suffix(".py") for folder in _search_folders)
    others = (path for path in candidates if file and path.is_file() and not path.samefile(file))
    return next((path for path in others if path.read_bytes() != Path(str(file)).read_bytes()), None)


def find_address(found: object) -> str | None:
    """Return the `package.module:OBJECT` of an object in a loaded module other than `__main__`, or None."""
    # We iterate over copies, because an import in another thread can add modules. Entries of sys.modules can be None.
    for module in [name for name in sys.modules if name != "__main__"]:
        for name, value in list(vars(sys.modules[module] or object).items()):
            if value is found and not name.startswith("_"):
                return f"{module}:{name}"
    return None


def describe_address(found: Any, what: str) -> str:
    """Return the address by which `load_object` finds an object again; a text is an address already.

    An object of the script that is running gets the address FILE.py:OBJECT.

    Raises:
        UserError: The object is not an attribute of a module, so a run could not be resumed.
    """
    if isinstance(found, str):
        return found
    if address := find_address(found):
        return address
    script = sys.modules["__main__"]
    name = next((name for name, value in vars(script).items() if value is found), None)
    if name is None or not getattr(script, "__file__", None):
        problem = f"{what} of type {type(found).__name__} is not an attribute of a module, so a run cannot record it"
        raise UserError(problem, "package.module:OBJECT", "define it at the top level of a file")
    return f"{Path(str(script.__file__)).resolve()}:{name}"


def check_signature(function: Callable[..., Any], what: str, *parameters: str) -> None:
    """Raise a UserError if a user's function cannot be called with these positional parameters."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        problem = f"{what} cannot be called with ({', '.join(parameters)}): {error}"
        raise UserError(problem, remedy="correct its parameters") from None
    except ValueError:  # some functions in C have no signature
        return


@contextmanager
def wrap_user_errors(what: str, expected: str) -> Iterator[None]:
    """Turn every exception in the `with` block, which tries out a user's object, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = f"{what} failed in a test call ({type(error).__name__}: {error})"
        raise UserError(problem, expected, "correct it; --debug shows the traceback") from error


class UserObject:
    """A user's callable with the address (`package.module:OBJECT`) and options that identify it in records.

    If the object is a class, it is instantiated with the options. Unknown attributes are looked up on the object.

    Raises:
        UserError: The object cannot be imported or called, or does not accept the options.
    """

    def __init__(self, address: str, what: str, options: Mapping[str, Any]) -> None:
        self.address, self.options = address, dict(options)
        target = load_object(address, what)
        if isinstance(target, type):
            try:
                target = target(**options)
            except (TypeError, ValueError) as error:
                problem = f"{what} {address!r} does not accept the options {dict(options)} ({error})"
                raise UserError(problem, remedy="change them") from error
        elif options:
            problem = f"{what} {address!r} is not a class and takes no options, but {', '.join(options)} is set"
            raise UserError(problem, remedy="remove the options, or name a class")
        if not callable(target):
            raise UserError(f"{what} {address!r} is of type {type(target).__name__}", "a callable", "name a function")
        self.target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "target" or name.startswith("__"):  # copying reads attributes before __init__ has run
            raise AttributeError(name)
        return getattr(self.target, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserObject) and (self.address, self.options) == (other.address, other.options)

    def __hash__(self) -> int:
        return hash(self.address)


def display_name(found: object) -> str:
    """Return the name of a user's object for error messages: its address, or else its `__name__`."""
    return getattr(found, "address", None) or getattr(found, "__name__", type(found).__name__)


def make_package_callable(package: str, workflow: str) -> None:
    """Make a package callable: `rest_rl.train(...)` calls `workflow` ("rest_rl.train.run:train"), imported lazily.

    It can still be used as a package: its modules are imported as usual.
    """
    # Python looks up __call__ on the type, and a module's __class__ may be assigned, so the module gets a subclass.

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
