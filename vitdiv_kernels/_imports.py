"""What waits for the import of a module that is too slow to be imported for it."""

import importlib.util
import sys
from collections.abc import Callable

_waiting: dict[str, list[Callable[[], None]]] = {}  # module name -> what to run then


def when_imported(name, function):
    """Runs `function()` as soon as the module has been imported, by whom ever; at once if it has been."""
    if name in sys.modules:
        function()
    else:
        _waiting.setdefault(name, []).append(function)


class _Finder:
    """Finds nothing itself, but sees what is looked for."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        functions = _waiting.pop(name, None)
        spec = functions and importlib.util.find_spec(name)
        if not spec:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for function in functions:
                function()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
