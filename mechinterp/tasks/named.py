"""Data by name: a built-in task, or a file of prompts, text or labelled texts."""

from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from mechinterp.tasks.catalogue import load_task
from mechinterp.tasks.frames import draw
from mechinterp.tasks.task import Task
from mechinterp.tasks.text import Labelled, Text


def load_prompts(
    name: str,
    model: TransformerBridge,
    n: int | None = None,
    seed: int = 0,
    first_token: bool = False,
) -> Task:
    """Return a built-in task or one from a .jsonl file, ``n`` prompts of it drawn by ``seed``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such task, or fewer prompts suit the model.
    """
    told = {"first_token": True} if first_token else {}
    if not name.endswith(".jsonl"):
        return load_task(name, model, n, seed, **told)
    task = Task.from_jsonl(name, model, **told)
    return task[draw(task.name, len(task), n, seed)]


def load_named(
    name: str,
    model: TransformerBridge,
    n: int | None = None,
    seed: int = 0,
    context: int | None = None,
) -> Task | Text | Labelled:
    """Return the data of that name: a task, the text in a .txt file, or labelled texts.

    A .jsonl file whose lines have ``text`` and ``label`` is labelled texts. ``n`` prompts of
    it; of a .txt file the first, in pieces of ``context`` tokens.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, or as in `load_prompts`.
    """
    if name.endswith(".txt"):
        text = load_text(Path(name), model, context)
        return text if n is None else text[: max(n, 1)]
    if name.endswith(".jsonl") and Labelled.in_jsonl(name):
        labelled = Labelled.from_jsonl(name, model)
        return labelled if n is None else labelled[: max(n, 1)]
    return load_prompts(name, model, n, seed)


def load_text(path: Path, model: TransformerBridge, context: int | None = None) -> Text:
    """Return a file's text in pieces of so many tokens, or as many as the model holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no text in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Check the name.")
    whole = path.read_text(encoding="utf-8")
    if not whole.strip():
        raise ValueError(f"{path} is empty. Pass a file with text in it.")
    most = model.cfg.n_ctx
    return Text.from_strings(model, whole, context=min(context or most, most), name=path.stem)
