"""The data that methods run on: prompts, tasks, texts and labelled examples."""

from mechinterp.tasks.positions import PositionSpec, position_axis, position_lists
from mechinterp.tasks.prompts import Prompts, as_prompts

__all__ = ["PositionSpec", "Prompts", "as_prompts", "position_axis", "position_lists"]
