"""Loads a network of one's own, named `package.module:NAME`, from the working folder, and reads its options.

Importing this loads no PyTorch; the user's module does.
"""

import ast
import difflib
import hashlib
import importlib
import inspect
import math
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

import cnn
from cnn.code_digest import code_digest, parsed
from cnn.config.networks import is_own
from cnn.errors import InputError

PASSED = ("channels", "image_size", "classes")
"""What each network gets by keyword; the other arguments of its class or function are its options."""

CONVOYS = ("cnn", "convoy_cli", "flows", "infra", "tasks")
"""Packages of Convoy."""

MISSING = "missing"
"""The digest of a file that is not there."""

_PLAIN = (bool, int, float, str, NoneType)


@dataclass(frozen=True)
class OwnNetwork:
    """A class or function of the user's that makes a network, as `own_network` has found it."""

    name: str
    folder: Path
    """The project's folder: the working folder when it was loaded."""

    builder: Callable[..., Any]
    files: Mapping[str, str]
    """SHA-256 of the syntax tree of each file in the folder that the import has loaded, by path in the folder."""

    defaults: Mapping[str, Any]
    adapter: TypeAdapter[dict[str, Any]]
    """Validates the options by their annotations."""

    def resolved(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all options as JSON values, those that are not given with the defaults of the signature.

        Raises:
            ValidationError: an option is unknown, missing or of a wrong type; the keys are those of the options.
            ValueError: a value cannot be written as JSON, or is infinite or not a number.
        """
        values = self._validated(given)
        if odd := [key for key, value in values.items() if not _is_value(value)]:
            raise ValueError(f"{', '.join(odd)}: give a finite number, a text, or a list of them")
        resolved: dict[str, Any] = self.adapter.dump_python(values, mode="json")
        return resolved

    def build(self, given: Mapping[str, Any], *, channels: int, image_size: int, classes: int) -> Any:
        """Calls the class or function.

        Raises:
            InputError: an option does not fit the signature, or the user's code raised an error.
        """
        try:
            options = self._validated(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{self.name}: network.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        with self.blamed():
            return self.builder(**options, channels=channels, image_size=image_size, classes=classes)

    def blamed(self, doing: str = "") -> AbstractContextManager[None]:
        """Turns an error in the block into an InputError that names the last line of the user's code that ran.

        Args:
            doing: what failed, if the error does not say it.
        """
        return _blamed(self.name, self.folder, doing)

    @property
    def place(self) -> str:
        """Name, file and line of the definition, for messages."""
        return _place(self.name, self.builder, self.folder)

    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema of the options."""
        schema = self.adapter.json_schema()
        for key, value in self.adapter.dump_python(dict(self.defaults), mode="json", warnings=False).items():
            schema["properties"][key]["default"] = value
        return {**schema, "description": f"Options of `{self.name}`, by its signature (`network.*`)."}

    def _validated(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.adapter.validate_python({**self.defaults, **given})


def own_network(name: str) -> OwnNetwork:
    """Returns the network of this name; the first call imports its module from the working folder.

    The folder becomes the last place in which Python looks for modules.

    Raises:
        InputError: the module cannot be found or imported, is not the project's, or has no such network; or the network
            cannot be called as Convoy calls it.
    """
    return _load(name, Path.cwd())


def is_loaded(name: str) -> bool:
    """Returns whether the module of a network of one's own was imported in this process."""
    return name.partition(":")[0] in sys.modules


def network_files(model: str) -> dict[str, str]:
    """Returns `OwnNetwork.files` of a network of one's own; of any other network nothing: `cnn` has its code."""
    return dict(own_network(model).files) if is_own(model) else {}


def digests(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Returns the digests of files as in `OwnNetwork.files`, or `MISSING`, without importing anything."""
    return {file: _digest(folder / file) for file in files}


def own_packages(model: str) -> tuple[str, ...]:
    """Returns the packages and modules at the top of `network_files`: `nets` for `nets/small.py`."""
    return tuple(sorted({Path(file).parts[0].removesuffix(".py") for file in network_files(model)}))


@cache
def _load(name: str, folder: Path) -> OwnNetwork:
    module_name, _, attribute = name.partition(":")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that it hides no installed module
    importlib.invalidate_caches()
    _check_place(name, module_name.partition(".")[0], folder)
    before = set(sys.modules)
    # What the module prints must not mix with JSON, and paths stay relative to the folder if it changes that.
    with _blamed(name, folder), redirect_stdout(sys.stderr), chdir(folder):
        module = importlib.import_module(module_name)
    own = _own_modules(folder)
    if module_name not in own:
        raise InputError(f"{name}: {module_name} is no file of {folder}; name the module that has {attribute}")
    loaded = _with_imports({module_name, *(own.keys() - before)}, own)
    _refuse_hidden(loaded.values(), folder)
    builder = _builder(name, module, attribute, folder)
    defaults, adapter = _options(name, builder, folder)
    files = {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(loaded.values())}
    return OwnNetwork(name, folder, builder, MappingProxyType(files), MappingProxyType(defaults), adapter)


def _check_place(name: str, top: str, folder: Path) -> None:
    """Raises InputError unless Python finds the package of this name, or module, in the project's folder."""
    found = _places(top)
    if any(_is_in_project(place, folder) for place in found):
        return
    if _has_module(folder, top):
        raise InputError(f"{name}: Python does not find this folder's {top}, but {_whose(top)}; rename yours")
    if found or top in sys.modules or top in sys.builtin_module_names:
        raise InputError(
            f"{name}: {top} is {_whose(top)}; a network of your own lies in the project's folder, here {folder}"
        )
    here = sorted({file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/*.py")})
    near = difflib.get_close_matches(top, here, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "call convoy in the project's folder"
    raise InputError(f"{name}: there is no module {top} in {folder}; {hint}")


def _places(top: str) -> list[Path]:
    """Returns where Python finds a package, or the file of a module; nothing if it is built in, or not there."""
    try:
        spec = find_spec(top)
    except ValueError:  # such as __main__
        return []
    if spec is None:
        return []
    origins = [spec.origin] if spec.has_location and spec.origin else []
    return [Path(place) for place in (*origins, *(spec.submodule_search_locations or ()))]


def _whose(top: str) -> str:
    """Returns words for a module that is not the project's."""
    if top in CONVOYS:
        return f"Convoy's own package {top}"
    if top in sys.stdlib_module_names or not (places := _places(top)):
        return f"Python's own module {top}"
    return f"the installed {places[0]}"


def _has_module(folder: Path, top: str) -> bool:
    return (folder / f"{top}.py").is_file() or any((folder / top).glob("*.py"))


@cache
def _elsewhere() -> tuple[Path, ...]:
    """Returns the folders of Python, of installed packages (perhaps a `.venv` in the project's) and of Convoy."""
    paths = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    convoys = Path(cnn.__path__[0]).parent
    return (*map(Path, (*paths, *site.getsitepackages())), *(convoys / name for name in CONVOYS))


def _is_in_project(file: Path, folder: Path) -> bool:
    if not file.is_absolute():  # code without a file, such as `<string>`
        return False
    file = Path(os.path.abspath(file))
    return file.is_relative_to(folder) and not any(map(file.is_relative_to, _elsewhere()))


def _own_modules(folder: Path) -> dict[str, Path]:
    """Returns the files of all modules of the project that are loaded, by the name of the module."""
    files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in list(sys.modules.items())}
    return {
        name: Path(os.path.abspath(file))
        for name, file in files.items()
        if name != "__main__" and isinstance(file, str) and _is_in_project(Path(file), folder)
    }


def _with_imports(names: set[str], own: Mapping[str, Path]) -> dict[str, Path]:
    """Adds to modules their packages and all modules of the project that they import.

    Another module may have imported these before, so that importing the network loaded less.
    """
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        parent = name.rpartition(".")[0]
        waiting += [parent] if parent else []
        if name in own and name not in found:
            found[name] = own[name]
            package = name if own[name].name == "__init__.py" else parent
            waiting += (module for module, _ in _imports(own[name], package) if module not in found)
    return found


def _imports(file: Path, package: str = "") -> Iterator[tuple[str, int]]:
    """Yields each module that a file's statements name (perhaps with what they take from it), and the line."""
    if file.suffix != ".py":
        return
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def _refuse_hidden(files: Iterable[Path], folder: Path) -> None:
    """Raises InputError if files import a module which the project has, but which Python finds elsewhere."""
    for file in files:
        for module, line in _imports(file):
            top = module.partition(".")[0]
            places = _places(top) if _has_module(folder, top) else []
            if places and not any(Path(os.path.abspath(place)).is_relative_to(folder) for place in places):
                raise InputError(
                    f"{file.relative_to(folder)}:{line} imports {top}, and Python does not find this folder's, but "
                    f"{_whose(top)}; rename yours"
                )


@contextmanager
def _blamed(name: str, folder: Path, doing: str = "") -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        lines = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            lines.append((Path(error.filename), error.lineno))
        own = [(file, line) for file, line in lines if _is_in_project(file, folder)]
        if isinstance(error, ImportError):
            _refuse_hidden({file for file, _ in own if file.exists()}, folder)
        where = f", {os.path.relpath(own[-1][0], folder)}:{own[-1][1]}" if own else ""
        text = error.msg if isinstance(error, SyntaxError) else (str(error).strip().splitlines() or [""])[0]
        raise InputError(": ".join(filter(None, (name + where, doing, type(error).__name__, text)))) from error


def _builder(name: str, module: Any, attribute: str, folder: Path) -> Callable[..., Any]:
    builder = getattr(module, attribute, None)
    if builder is None:
        makers = [key for key, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
        near = difflib.get_close_matches(attribute, makers, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{name}: {os.path.relpath(module.__file__, folder)} has no {attribute}{hint}")
    if not callable(builder) or (not inspect.isclass(builder) and hasattr(builder, "forward")):
        kind = type(builder).__name__
        raise InputError(f"{name} is an object of type {kind}; name a class or a function that makes the network")
    made: Callable[..., Any] = builder
    return made


def _place(name: str, builder: Callable[..., Any], folder: Path) -> str:
    try:
        file, line = inspect.getfile(builder), inspect.getsourcelines(builder)[1]
    except (OSError, TypeError):  # of code without a source
        return name
    return f"{name}, {os.path.relpath(file, folder)}:{line}"


def _options(
    name: str, builder: Callable[..., Any], folder: Path
) -> tuple[dict[str, Any], TypeAdapter[dict[str, Any]]]:
    """Returns the defaults of a signature's options, and what validates the options.

    An option without an annotation, or with one that is not made of `int`, `float`, `bool`, `str`, `tuple`, `list`,
    `None` and `Literal`, takes any value. One whose default is none of YAML's values keeps it, and cannot be set.
    """
    where = _place(name, builder, folder)
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):
        raise InputError(f"{where}: its signature cannot be read") from None
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    by_keyword = {
        key: each for key, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    if not takes_any and (lacking := [key for key in PASSED if key not in by_keyword]):
        raise InputError(f"{where}: it must take {', '.join(PASSED)} by keyword, and lacks {', '.join(lacking)}")
    try:
        hints = get_type_hints(builder.__init__ if inspect.isclass(builder) else builder)
    except Exception:  # an annotation may name what exists for type checkers only
        hints = {}
    defaults: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for key, each in by_keyword.items():
        has_default = each.default is not each.empty
        if key in PASSED or (has_default and not _is_value(each.default)):
            continue
        kind = hints.get(key, tuple[Any, ...] if isinstance(each.default, tuple) else Any)
        types[key] = kind if _is_simple(kind) else Any
        if has_default:
            defaults[key] = each.default
            types[key] = types[key] if each.default is not None else Union[types[key], None]  # noqa: UP007
    typed_dict: Any = TypedDict  # for type checkers, its fields are literals
    options = typed_dict("Options", types)
    options.__pydantic_config__ = ConfigDict(extra="allow" if takes_any else "forbid")
    return defaults, TypeAdapter(options)


def _is_simple(annotation: Any) -> bool:
    """Returns whether values of a type can be written in YAML."""
    if get_origin(annotation) is Literal:
        return True
    if get_origin(annotation) in (Union, UnionType, tuple, list):
        return all(each is Ellipsis or each is Any or _is_simple(each) for each in get_args(annotation))
    return annotation in (*_PLAIN, tuple, list)


def _is_value(value: object) -> bool:
    """Returns whether YAML and JSON have a value; neither JSON nor its digests have infinite numbers."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_value, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_value, value))
    return type(value) in _PLAIN and (not isinstance(value, float) or math.isfinite(value))


def _digest(file: Path) -> str:
    """Returns the digest of a module: of Python code without comments and formatting, of another file as it is."""
    try:
        return code_digest([file]) if file.suffix == ".py" else hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError:
        return MISSING
    except SyntaxError:
        return "no Python"
