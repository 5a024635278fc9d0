"""Hooks: capture, patch, ablate and steer activations, and leave the model as it was."""

from mechinterp.hooks.editing import HookNotFiredError
from mechinterp.hooks.manager import HookManager

__all__ = ["HookManager", "HookNotFiredError"]
