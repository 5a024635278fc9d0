"""The data that methods run on: prompts, tasks, texts and labelled examples."""

from mechinterp.tasks.catalogue import TaskTable, load_task, tasks
from mechinterp.tasks.data import as_data
from mechinterp.tasks.induction import repeated_tokens
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
    "TaskTable",
    "Text",
    "answer_logits",
    "as_data",
    "as_prompts",
    "load_task",
    "logits_at",
    "position_axis",
    "position_lists",
    "repeated_tokens",
    "tasks",
]
