"""What the induction dossier says: one table, one account in words, one figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from mechinterp._files import written_beside
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.heads.composition import Composition
from mechinterp.heads.dossier_figure import draw
from mechinterp.heads.dossier_table import NONE, VERDICTS, evidence, heads_that
from mechinterp.heads.icl_result import IclResult
from mechinterp.heads.knockout import KnockOut
from mechinterp.heads.scores_result import HeadScores
from mechinterp.inference import ALPHA
from mechinterp.nulls import Head

_FORMAT = 1
_NUMBERS = ("induction", "p_adjusted", "copying", "ov_copying", "rise", "rise_low", "rise_high")
_BY_WEIGHTS = ("k_partner", "k_composition", "k_partner_previous")


@dataclass(frozen=True, eq=False, repr=False)
class InductionDossier:
    """The evidence on a model's induction heads, each part a result of its own.

    Attributes:
        scores: Of all heads: prefix matching, copying, previous token.
        composition: Of all pairs of heads.
        knock_out: The candidates alone, together, and random sets.
        paths: From every earlier head into each candidate's keys; None where all candidates
            are in the first layer.
        loss: Along two copies of random tokens, in nats, on ``prompt`` and ``position``.
        icl: The in-context-learning score on text, where one was given.
        candidates: The heads, as pairs (layer, head).
        settings: What was asked for, and how the candidates were ``"chosen"``: ``"given"``,
            ``"matching"`` prefixes, or ``"nearest"`` to that where no head does.
    """

    scores: HeadScores
    composition: Composition
    knock_out: KnockOut
    paths: PatchingResult | None
    loss: xr.DataArray
    icl: IclResult | None
    candidates: tuple[Head, ...]
    settings: Mapping[str, Any]

    @property
    def matching(self) -> list[Head]:
        """All heads that match prefixes, the best first: candidates or not."""
        return heads_that(self.scores, "induction", self.settings["least"])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per candidate: verdicts, then numbers.

        Verdicts are ``"yes"``, ``"no"`` or, with too few prompts to tell, ``"unknown"``:
        ``matches`` prefixes by the criterion; ``copies``: raises the logits of what it attends
        to, significantly above untrained heads; ``path``: some earlier head's output reaches
        its keys (max-T over all senders); ``from_previous``: that head attends to the token
        before, by the same criterion; ``needed``: the second copy loses without it (max-T over
        the candidates).

        ``rise``: nats that the second copy loses without it. ``k_partner`` is the head whose
        output its keys read most, by weights, with its previous-token score; ``path_partner``
        the one whose patched output significantly restores most through its keys (or none),
        with effect (nats), interval and p of the strongest sender, and that partner's
        K-composition and rank among all earlier heads.
        """
        parts = (self.scores, self.composition, self.knock_out, self.paths)
        return evidence(self.candidates, *parts, self.settings["least"])

    def summary(self) -> str:
        """Return the account in words."""
        table = self.to_frame()
        n = self.loss.sizes["position"] // 2
        first, second = (
            float(part.mean()) for part in (self.loss[:, 1:n], self.loss[:, n + 1 :])
        )
        lines = [
            f"Induction in {self.scores.convention.model}",
            f"Loss on random tokens: {first:.2f} nats on the first copy, {second:.2f} on the "
            f"second; copying is worth {first - second:.2f}.",
            self._who(table),
            *self._random_sets(),
            *_disagreements(table),
            *self._on_text(),
            "",
            table[["head", *VERDICTS]].to_string(index=False),
            *[f"  {name}: {meaning}" for name, meaning in VERDICTS.items()],
            "",
            _printed(table, _NUMBERS),
            "",
            _printed(table, _BY_WEIGHTS),
            "",
            _printed(table, [str(c) for c in table if str(c).startswith("path_")]),
        ]
        return "\n".join(lines)

    def _who(self, table: pd.DataFrame) -> str:
        names, least = ", ".join(table["head"]), self.settings["least"]
        criterion = (
            f"{least:g} of their attention more than untrained heads, significantly "
            f"(p < {ALPHA})"
        )
        if self.matching:
            return (
                f"Candidates: {names}. {len(self.matching)} heads of this model match "
                f"prefixes: {criterion}."
            )
        what = "Candidates" if self.settings["chosen"] == "given" else "Nearest to it"
        return f"No head of this model matches prefixes: {criterion}. {what}: {names}."

    def _random_sets(self) -> list[str]:
        lost = self.knock_out
        together, random = float(lost.data["together"].mean()), lost.data["random"].values
        sets = [str(each).split() for each in lost.data["set"].values]
        pool = {head for each in sets for head in each}
        alike = pool & {f"{layer}.{head}" for layer, head in self.matching}
        lines = [
            f"Without them the second copy loses {together:+.2f} nats, without as many random "
            f"heads of the same layers {random.mean():+.2f} ({random.min():+.2f} to "
            f"{random.max():+.2f}, {len(random)} different sets of "
            f"{lost.convention.settings['sets_possible']} possible).",
            f"Of the {len(pool)} heads in those sets {len(alike)} match prefixes themselves.",
        ]
        p = f"p = {lost.p:.2g}; so many sets can give no p below {lost.smallest_p:.2g}"
        if lost.smallest_p <= ALPHA:
            verdict = "stand out" if lost.p < ALPHA else "do not stand out"
            return [*lines, f"They {verdict} from random sets ({p})."]
        few = len(random) == lost.convention.settings["sets_possible"]
        do = (
            "No more exist: these layers have too few other heads. Judge each candidate by its "
            "own knock-out, or name candidates of other layers (heads=)."
            if few
            else f"Ask for at least n_sets={round(1 / ALPHA)}."
        )
        return [*lines, f"Whether they stand out from random sets cannot be told ({p}). {do}"]

    def _on_text(self) -> list[str]:
        if self.icl is None:
            return []
        low, high = self.icl.interval()
        told = self.icl.convention
        late, early = told.settings["late"], told.settings["early"]
        return [
            f"In-context-learning score on {told.data}: {self.icl.score:+.2f} nats at token "
            f"{late} against token {early} (95 % interval {low:+.2f} to {high:+.2f})."
        ]

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"

    def figure(self) -> Figure:
        """Draw prefix matching, the loss along the copies, knock-outs and the keys' senders."""
        return draw(self.scores, self.matching, self.loss, self.knock_out, self.paths)

    def save(self, folder: str | Path) -> Path:
        """Write the account, the figure and every result into a folder; return the folder.

        ``load`` gives back an equal dossier. An older one in that folder is replaced.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / "dossier.json"
        index.unlink(missing_ok=True)  # what is half written is no dossier
        for name in _PARTS:
            part = getattr(self, name)
            if part is None:
                (folder / f"{name}.nc").unlink(missing_ok=True)
            else:
                part.save(folder / f"{name}.nc")
        with written_beside(folder / "loss.nc") as part:
            self.loss.to_netcdf(part, engine="h5netcdf")
        with written_beside(folder / "account.txt") as part:
            part.write_text(self.summary() + "\n", encoding="utf-8")
        with written_beside(folder / "heads.csv") as part:
            self.to_frame().to_csv(part, index=False)
        with written_beside(folder / "dossier.png") as part:
            self.figure().savefig(part, dpi=150, format="png", bbox_inches="tight")
        told = {
            "mechinterp_dossier": _FORMAT,
            "candidates": self.candidates,
            "settings": dict(self.settings),
            "parts": [name for name in _PARTS if getattr(self, name) is not None],
        }
        with written_beside(index) as part:
            part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "InductionDossier":
        """Return the dossier that ``save`` wrote into a folder.

        Raises:
            FileNotFoundError: There is no dossier, or one of its files is gone.
            ValueError: A file is no part of a dossier.
        """
        folder = Path(folder)
        index = folder / "dossier.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"there is no dossier in {folder}: dossier.json is missing. "
                "InductionDossier.save writes one."
            )
        told = json.loads(index.read_text(encoding="utf-8"))
        if told.get("mechinterp_dossier") != _FORMAT:
            raise ValueError(f"{index} is not a dossier of format {_FORMAT}.")
        parts: dict[str, Any] = {
            name: kind.load(folder / f"{name}.nc") if name in told["parts"] else None
            for name, kind in _PARTS.items()
        }
        with xr.open_dataarray(folder / "loss.nc", engine="h5netcdf") as stored:
            loss = stored.load().drop_encoding()
        candidates = tuple((layer, head) for layer, head in told["candidates"])
        return cls(**parts, loss=loss, candidates=candidates, settings=told["settings"])


_PARTS: dict[str, Any] = {
    "scores": HeadScores,
    "composition": Composition,
    "knock_out": KnockOut,
    "paths": PatchingResult,
    "icl": IclResult,
}


def _disagreements(table: pd.DataFrame) -> list[str]:
    """Return a line for the candidates whose two partners are not the same head."""
    told = [
        f"{row['head']} (path {row['path_partner']}, rank {row['path_k_rank']:.0f} by weights; "
        f"weights {row['k_partner']})"
        for _, row in table.iterrows()
        if row["path_partner"] not in (NONE, row["k_partner"])
    ]
    return [f"Paths and weights name different partners for {', '.join(told)}."] if told else []


def _printed(table: pd.DataFrame, columns: Sequence[str]) -> str:
    shown = table.filter(["head", *columns]).copy()
    for column in shown:
        if str(column) in ("p_adjusted", "path_p"):
            shown[column] = [_p(value) for value in shown[column]]
        elif str(column) == "path_k_rank":
            shown[column] = ["" if pd.isna(rank) else f"{rank:.0f}" for rank in shown[column]]
    return shown.round(3).to_string(index=False, na_rep="")


def _p(value: float) -> str:
    """Return a p-value that is never said to be 0."""
    return "" if pd.isna(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
