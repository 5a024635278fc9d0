"""The data that methods run on: prompts, tasks, texts and labelled examples."""

from mechinterp.tasks.data import as_data
from mechinterp.tasks.positions import PositionSpec, position_axis, position_lists
from mechinterp.tasks.prompts import Prompts, as_prompts
from mechinterp.tasks.run import answer_logits, logits_at
from mechinterp.tasks.task import Task
from mechinterp.tasks.text import Labelled, Text

__all__ = [
    "Labelled",
    "PositionSpec",
    "Prompts",
    "Task",
    "Text",
    "answer_logits",
    "as_data",
    "as_prompts",
    "logits_at",
    "position_axis",
    "position_lists",
]
