"""A task: prompts whose answer is known, and a corrupted version in which it is not.

Everything a causal method needs travels together: clean and corrupted prompts (of any
lengths), answers and distractors, and the roles that say which tokens of the two prompts
correspond.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.metrics import Targets, accuracy, apply_metric
from mechinterp.tasks.answers import Answer
from mechinterp.tasks.parts import (
    AnswerAt,
    assemble,
    both_sides,
    collisions,
    take,
    token_spans,
    with_end,
)
from mechinterp.tasks.positions import Roles
from mechinterp.tasks.prompts import Prompts, as_prompts, choose, encode, pad
from mechinterp.tasks.roles import Place, find_roles
from mechinterp.tasks.run import logits_at


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Prompts with answers, their corrupted versions, and named roles.

    Make one with :meth:`from_strings`, :meth:`from_tokens`, :meth:`from_jsonl` or
    ``mi.load_task``.

    Attributes:
        name: What the task is called in results.
        clean: The prompts that show the behaviour.
        answers: Right tokens per prompt, a set right-padded with -1.
        corrupted: The prompts that do not show it, one per clean prompt, of any length.
        corruption: Instead of ``corrupted``: edits under which the clean prompts run.
        distractors: Wrong tokens per prompt, a set right-padded with -1.
        roles: Named token spans ``(start, end)`` per clean prompt, end exclusive. ``"end"``,
            the last token, is always there.
        corrupted_roles: The same for the corrupted prompts; taken over from ``roles`` where
            clean and corrupted prompts are equally long.
        templates: A label per prompt that says which template made it.
        cases: A number per prompt. Prompts that share it are draws of one case, such as several
            draws of noise: intervals resample cases, never draws. By default each is its own.
        metric: What methods measure unless they are told otherwise.
        answer_positions: Where each clean prompt is answered, counted from its start;
            by default its last token.
        corrupted_answer_positions: The same for the corrupted prompts; by default as far from
            the end as in the clean ones.
        words: The text of each token id in use, for :meth:`show`.
        info: How the task came about: options, seed, rows dropped and why.

    Raises:
        ValueError: The parts do not fit together.
    """

    name: str
    clean: Prompts
    answers: Int[Tensor, "prompt n_answer"]
    corrupted: Prompts | None = None
    corruption: tuple[Any, ...] = ()
    distractors: Int[Tensor, "prompt n_distractor"] | None = None
    roles: Roles = field(default_factory=dict)
    corrupted_roles: Roles | None = None
    templates: tuple[str, ...] = ()
    cases: tuple[int, ...] = ()
    metric: str | Callable = ""
    answer_positions: tuple[int, ...] = ()
    corrupted_answer_positions: tuple[int, ...] = ()
    words: Mapping[int, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.corrupted is not None and self.corruption:
            raise ValueError("pass corrupted prompts or a corruption by edits, not both.")
        roles = with_end(self.roles, self.clean)
        lengths = self.clean.lengths.tolist()
        positions = self.answer_positions or tuple(n - 1 for n in lengths)
        filled: dict[str, Any] = {
            "roles": roles,
            "templates": tuple(self.templates) or (self.name,) * len(self),
            "cases": tuple(self.cases) or tuple(range(len(self))),
            "metric": self.metric or ("log_prob" if self.distractors is None else "logit_diff"),
            "answer_positions": positions,
        }
        if self.corrupted is not None:
            theirs = both_sides(roles, self.corrupted_roles, self.clean, self.corrupted)
            from_end = [n - at for n, at in zip(lengths, positions, strict=True)]
            ends = self.corrupted.lengths.tolist()
            filled["corrupted_roles"] = theirs
            filled["corrupted_answer_positions"] = self.corrupted_answer_positions or tuple(
                n - back for n, back in zip(ends, from_end, strict=True)
            )
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        counts = {
            "answers": len(self.answers),
            "templates": len(self.templates),
            "cases": len(self.cases),
            "answer_positions": len(self.answer_positions),
        }
        for name, count in counts.items():
            if count != len(self):
                raise ValueError(
                    f"there are {len(self)} prompts but {count} {name}. Pass one per prompt."
                )
        self.targets()
        if both := collisions(self.answers, self.distractors):
            raise ValueError(
                f"answer and distractor are the same token in prompt {both[0]}, so nothing can "
                "tell them apart. Choose another distractor."
            )

    @classmethod
    def from_strings(
        cls,
        model: TransformerBridge,
        *,
        clean: Sequence[str],
        answers: Sequence[Answer],
        corrupted: Sequence[str] | None = None,
        distractors: Sequence[Answer] | None = None,
        roles: Mapping[str, Place | Sequence[Place]] | None = None,
        corrupted_roles: Mapping[str, Place | Sequence[Place]] | None = None,
        first_token: bool = False,
        answer_at: AnswerAt = None,
        prepend_bos: bool | None = None,
        **fields: Any,
    ) -> "Task":
        """Return a task from prompts and answers as text.

        Args:
            model: Whose tokenizer reads them.
            clean: The prompts that show the behaviour.
            answers: The right continuation of each, a single token (mind its leading space),
                or a list where any of several is right. A token id serves as well.
            corrupted: The prompts that do not show it; their lengths may differ.
            distractors: The wrong continuation, or several, as ``answers``.
            roles: Named places in the clean prompts: a substring that occurs once,
                ``(substring, n)`` for its n-th occurrence from 0, or ``(start, end)`` in
                characters; one for all prompts or a list with one per prompt.
            corrupted_roles: The same places in the corrupted prompts; needed where a corrupted
                prompt has another number of tokens.
            first_token: Let an answer of several tokens stand for its first one. Prompts whose
                answer and distractor then collide are dropped and counted in ``info``.
            answer_at: The position or role at which the model answers, or one per prompt. By
                default the last token, or the mask token of a masked language model.
            prepend_bos: Overrides the rule for the beginning of sequence.
            **fields: ``name``, ``templates``, ``cases``, ``metric``, ``corruption``, ``info``,
                as in the class.

        Raises:
            ValueError: A role is not in its prompt, an answer is not a single token, or the
                numbers of prompts differ. Nothing is run before all is checked.
        """
        texts = {"clean": list(clean)} | (
            {} if corrupted is None else {"corrupted": [*corrupted]}
        )
        prompts, spans = {}, {}
        for side, places in {"clean": roles, "corrupted": corrupted_roles}.items():
            if side not in texts:
                continue
            rows, offsets, bos = encode(model, texts[side], prepend_bos=prepend_bos)
            prompts[side] = as_prompts(model, pad(rows, texts[side], bos))
            if places and offsets is None:
                raise ValueError(
                    "this tokenizer does not say which characters a token covers, so roles "
                    "cannot be found in strings. Pass token spans to mi.Task.from_tokens."
                )
            spans[side] = places and find_roles(texts[side], offsets or [], places)
        parts = assemble(model, prompts, spans, answers, distractors, first_token, answer_at)
        return cls(**_without_collisions({"name": "task", **fields} | parts, first_token))

    @classmethod
    def from_tokens(
        cls,
        model: TransformerBridge,
        *,
        clean: Any,
        answers: Sequence[Answer],
        corrupted: Any = None,
        distractors: Sequence[Answer] | None = None,
        roles: Mapping[str, Any] | None = None,
        corrupted_roles: Mapping[str, Any] | None = None,
        first_token: bool = False,
        answer_at: AnswerAt = None,
        **fields: Any,
    ) -> "Task":
        """Return a task from prompts as token ids, which stay as they are.

        As :meth:`from_strings`, with token ids in place of text.

        Args:
            model: Whose vocabulary they are of.
            clean: A tensor, or a list of lists, of token ids.
            answers: As in :meth:`from_strings`.
            corrupted: As ``clean``.
            distractors: As in :meth:`from_strings`.
            roles: Token spans ``(start, end)``, end exclusive, by name: one for all prompts or
                a list with one per prompt.
            corrupted_roles: The same places in the corrupted prompts.
            first_token: As in :meth:`from_strings`.
            answer_at: As there.
            **fields: As there.

        Raises:
            ValueError: As in :meth:`from_strings`.
        """
        prompts = {"clean": as_prompts(model, clean)}
        spans = {"clean": token_spans(roles, len(prompts["clean"]))}
        if corrupted is not None:
            prompts["corrupted"] = as_prompts(model, corrupted)
            spans["corrupted"] = token_spans(corrupted_roles, len(prompts["corrupted"]))
        parts = assemble(model, prompts, spans, answers, distractors, first_token, answer_at)
        return cls(**_without_collisions({"name": "task", **fields} | parts, first_token))

    @classmethod
    def from_jsonl(
        cls,
        path: str | PathLike[str],
        model: TransformerBridge,
        *,
        first_token: bool | None = None,
    ) -> "Task":
        """Return the task in a JSON-lines file; ``mechinterp.tasks.jsonl`` has the format.

        Args:
            path: The file, one prompt a line.
            model: Whose tokenizer reads it.
            first_token: Overrides what the file says, as in :meth:`from_strings`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line is not of the format, or as in :meth:`from_strings`.
        """
        from mechinterp.tasks.jsonl import read_task

        return read_task(Path(path), model, first_token)

    def to_jsonl(
        self, path: str | PathLike[str], model: TransformerBridge | None = None
    ) -> None:
        """Write the task to the file ``path``, so that :meth:`from_jsonl` gives it back.

        With ``model`` the file holds text, which other models can read too; without it, or
        where text would not give the same tokens again, token ids.
        """
        from mechinterp.tasks.jsonl import write_task

        write_task(self, Path(path), model)

    def targets(self, reference: Float[Tensor, "prompt d_vocab"] | None = None) -> Targets:
        """Return what metrics compare logits with; ``reference`` logits are for ``kl``."""
        return Targets(self.answers, self.distractors, reference)

    def logits(
        self, model: TransformerBridge, side: Literal["clean", "corrupted"] = "clean"
    ) -> Float[Tensor, "prompt d_vocab"]:
        """Return the model's logits where it answers the clean or the corrupted prompts.

        Args:
            model: Left as it was.
            side: Which of the two.

        Raises:
            ValueError: The task has no corrupted prompts, or is corrupted by edits.
        """
        if side == "clean":
            return logits_at(model, self.clean, self.answer_positions)
        if self.corrupted is None:
            what = (
                "is corrupted by edits, not" if self.corruption else "comes without corrupted"
            )
            raise ValueError(f"task {self.name!r} {what} prompts. Run its clean ones.")
        return logits_at(model, self.corrupted, self.corrupted_answer_positions)

    def filter(self, model: TransformerBridge) -> "Task":
        """Return the prompts that the model gets right; ``info["filtered"]`` says how many.

        Right means ``metrics.accuracy``: the best answer beats every distractor, or, without
        distractors, every other token.

        Raises:
            ValueError: It gets none right.
        """
        right = apply_metric("accuracy", accuracy, self.logits(model), self.targets())
        kept = right.nonzero().flatten().tolist()
        if not kept:
            raise ValueError(
                f"the model gets none of the {len(self)} prompts of task {self.name!r} right, "
                "so no prompt is left. mi.tasks(model) shows what it can do."
            )
        told = self.with_info(filtered={"kept": len(kept), "of": len(self)})
        return told[kept]

    def with_info(self, **told: Any) -> "Task":
        """Return the same task with more told in ``info``."""
        return replace(self, info={**self.info, **told})

    def show(self, n: int = 8) -> None:
        """Print the first ``n`` prompts as tokens, with roles, answers and distractors."""
        from mechinterp.tasks.show import show_task

        show_task(self, n)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> "Task":
        """Return the task with some of its prompts."""
        return replace(self, **take(vars(self), choose(chosen, len(self))))

    def __repr__(self) -> str:
        """Say what is in it, and what was dropped on the way."""
        lengths = self.clean.lengths.tolist()
        span = (
            f"{min(lengths)}"
            if min(lengths) == max(lengths)
            else f"{min(lengths)}-{max(lengths)}"
        )
        runs = "corrupted prompts" if self.corrupted is not None else "no corrupted prompts"
        if self.corruption:
            runs = f"corrupted by {len(self.corruption)} edits"
        notes = [f"dropped {n}: {why}" for why, n in self.info.get("dropped", {}).items() if n]
        if filtered := self.info.get("filtered"):
            notes.append(
                f"kept {filtered['kept']} of {filtered['of']} that the model gets right"
            )
        count = f"{len(self)} prompts"
        if (cases := len(set(self.cases))) < len(self):
            count = f"{len(self)} draws of {cases} prompts"
        said = [f"{count} of {span} tokens", runs, f"roles {', '.join(self.roles)}"]
        return f"Task({self.name!r}: {'; '.join([*said, *notes])})"


def _without_collisions(parts: dict[str, Any], first_token: bool) -> dict[str, Any]:
    """Drop the prompts whose answer and distractor begin alike, and count them.

    Raises:
        ValueError: All of them do.
    """
    both = set(collisions(parts["answers"], parts.get("distractors"))) if first_token else set()
    n = len(parts["clean"])
    if len(both) == n:
        raise ValueError(
            "answer and distractor begin with the same token in every prompt, so no prompt is "
            "left. Choose other distractors."
        )
    info = dict(parts.get("info", {}))
    if first_token:
        dropped = {**info.get("dropped", {}), "answer and distractor begin alike": len(both)}
        info |= {"first_token": True, "dropped": dropped}
    kept = [i for i in range(n) if i not in both]
    return parts | (take(parts, kept) if both else {}) | {"info": info}
