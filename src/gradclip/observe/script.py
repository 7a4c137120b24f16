"""Runs a script as ``python SCRIPT`` would, or a module as ``python -m MODULE`` would."""

import builtins
import io
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from gradclip.observe.tracebacks import drop_first_frames

__all__ = ["run_script"]

_ARCHIVES = (".zip", ".pyz", ".pyzw")


def run_script(arguments: list[str], *, is_module: bool) -> None:
    """Run a script; what it raises comes out, and is shown as if nobody had run it.

    Args:
        arguments: The script, or the module, and what it finds in ``sys.argv``.
        is_module: Whether it is a module.
    """
    sys.argv = list(arguments)
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    try:
        _as_main(main, arguments[0], is_module=is_module)
    except SystemExit:
        raise
    except BaseException:
        drop_first_frames(_as_main.__code__)
        raise


def _as_main(main: ModuleType, target: str, *, is_module: bool) -> None:
    if is_module:
        _begin_path_with(str(Path.cwd()))
        runpy._run_module_as_main(target, alter_argv=True)  # type: ignore[attr-defined]  # noqa: SLF001
    elif Path(target).is_dir() or target.endswith(_ARCHIVES):
        _begin_path_with(str(Path(target).absolute()))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]  # noqa: SLF001
    else:
        path = str(Path(target).absolute())
        _begin_path_with(str(Path(target).resolve().parent))
        try:
            with io.open_code(path) as file:
                source = file.read()
        except OSError as error:
            said = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
            sys.stderr.write(f"{sys.executable}: {said}\n")
            sys.exit(2)
        loader = SourceFileLoader("__main__", path)
        given = {"file": path, "loader": loader, "cached": None, "annotations": {}}
        vars(main).update({f"__{name}__": value for name, value in given.items()})
        exec(compile(source, path, "exec", dont_inherit=True), vars(main))  # noqa: S102


def _begin_path_with(folder: str) -> None:
    """Have imports look in a folder first, as the interpreter does, unless it was told not to."""
    if not sys.flags.safe_path:
        sys.path[0] = folder
