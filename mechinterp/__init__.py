"""Find the circuit behind a transformer's behaviour, prove it causally, cut away the rest.

The public names are flat: ``import mechinterp as mi``, then ``mi.load_model()``,
``mi.load_task("ioi", model)``, ``mi.activation_patching(model, task, "z")``. They are loaded
when first used, so importing the package costs nothing.
"""

from importlib import import_module

from mechinterp._version import __version__

_HOME = {
    "mechinterp.activations": ["Activations"],
    "mechinterp.causal.patching": ["PatchingResult", "activation_patching"],
    "mechinterp.hooks": ["HookManager", "HookNotFiredError"],
    "mechinterp.models": [
        "Verification",
        "fingerprint",
        "load_model",
        "save_model",
        "unwrap",
        "verify",
    ],
    "mechinterp.results": ["Convention", "Result", "load_result"],
    "mechinterp.sites": ["Site", "SiteCatalogue", "sites"],
    "mechinterp.tasks": [
        "Labelled",
        "Prompts",
        "Task",
        "Text",
        "load_task",
        "repeated_tokens",
        "tasks",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = ["edits", "metrics"]

__all__ = sorted([*_MODULE_OF, *_SUBMODULES, "__version__"])


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name in _SUBMODULES:
        return import_module(f"mechinterp.{name}")
    raise AttributeError(f"module 'mechinterp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
