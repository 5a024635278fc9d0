"""A task on the screen: prompts cut into tokens, roles marked by name and colour."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from mechinterp.tasks.positions import Roles
from mechinterp.tasks.task import Task

# Okabe and Ito's colour-blind-safe palette.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")


def show_task(task: Task, n: int, console: Console | None = None) -> None:
    """Print the first ``n`` prompts of a task, clean above corrupted.

    Tokens are parted by ``|``; a role's span is written ``[role: tokens]``.
    """
    console = console or Console()
    lines = [Text(repr(task), style="bold")]
    for i in range(min(n, len(task))):
        lines.append(marked(_words(task, task.clean.rows[i]), task.roles, i, "clean     "))
        if task.corrupted is not None and task.corrupted_roles is not None:
            row = _words(task, task.corrupted.rows[i])
            lines.append(marked(row, task.corrupted_roles, i, "corrupted "))
        lines.append(Text(_expected(task, i), style="dim"))
    if n < len(task):
        lines.append(Text(f"... and {len(task) - n} more prompts", style="dim"))
    for line in lines:
        console.print(line, soft_wrap=True)


def marked(words: Sequence[str], roles: Roles, prompt: int, label: str) -> Text:
    """Return one prompt's tokens with its roles written around their spans."""
    opening: dict[int, str] = {}
    closing: dict[int, int] = {}
    colour: dict[int, str] = {}
    for k, (role, spans) in enumerate(roles.items()):
        start, end = spans[prompt]
        opening[start] = opening.get(start, "") + f"[{role}: "
        closing[end] = closing.get(end, 0) + 1
        colour |= dict.fromkeys(range(start, end), _COLOURS[k % len(_COLOURS)])
    line = Text(label, style="dim")
    for i, word in enumerate(words):
        style = colour.get(i, "not dim")
        line.append("|" if i else "", "dim")
        line.append(opening.get(i, ""), style)
        line.append(word.replace("\n", "\\n"), style)
        line.append("]" * closing.get(i + 1, 0), style)
    return line


def _words(task: Task, tokens: Sequence[int]) -> list[str]:
    return [task.words.get(token, str(token)) for token in tokens]


def _expected(task: Task, prompt: int) -> str:
    said = f"          answer {_named(task, task.answers[prompt].tolist())}"
    if task.distractors is not None:
        said += f"   distractor {_named(task, task.distractors[prompt].tolist())}"
    return said


def _named(task: Task, tokens: Sequence[int]) -> str:
    return " ".join(repr(word) for word in _words(task, [t for t in tokens if t >= 0]))
