"""Writing a report: from a result, a folder of them, or a sweep's run to one HTML file."""

import os
from collections.abc import Mapping
from pathlib import Path

from mechinterp._files import written_beside
from mechinterp.report.contents import panels_of
from mechinterp.report.page import Section, page
from mechinterp.results import Result, load_result
from mechinterp.sweeps.opened import SweepRun, open_run, telling
from mechinterp.sweeps.places import Place

Source = Result | Mapping[str, Result] | SweepRun | str | os.PathLike[str]
_MOST_CALLS = 60  # of a run in one file; each takes some 100 kB


def report(
    source: Source,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    account: str = "",
) -> Path:
    """Write a result, or all results in a folder, as one interactive HTML file.

    The file needs no network and no other file. It holds means, 95 % intervals and corrected
    p-values of every cell, values of single prompts, tables to sort and filter, and what else
    each kind of result has to show.

    Args:
        source: A result, a file that ``save`` wrote, or a folder of such files (``.nc``, also
            in folders inside it), which become one report with a table of contents; a sweep's
            run, or its folder, of which what is done is shown, 60 calls at most; or results by
            name, in their order.
        path: Where to write, ending in ``.html``. Completely or not at all.
        title: What stands at the top. Default: the name of the data or of the folder.
        account: Plain text to begin with.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: There is no such file or folder, or none to write to.
        ValueError: ``path`` does not end in ``.html``, a file is not a result, or a folder has
            none, or a run where nothing is done yet.
        OSError: The file cannot be written; an older one stays as it was.
    """
    final = Path(path)
    if final.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"a report is an HTML file, but {final} does not end in .html. Name it so."
        )
    if not final.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {final}: the folder {final.absolute().parent} does not exist. "
            "Create it first."
        )
    if isinstance(source, str | os.PathLike) and Place(Path(source)).ledger.exists():
        source = open_run(source)
    named, left_out = _results(source)
    sections = [Section(name, result, panels_of(result)) for name, result in named]
    if title is None:
        title = _title(source, named[0][0])
    text = page(sections, title, account, left_out)
    with written_beside(final) as part:
        part.write_text(text, encoding="utf-8")
    return final


def _title(source: Source, first: str) -> str:
    if isinstance(source, SweepRun):
        return str(source.spec.get("name", source.folder.name))
    if isinstance(source, str | os.PathLike):
        place = Path(source).resolve()
        return place.name if place.is_dir() else place.stem
    return first if isinstance(source, Result) else "Results"


def _results(source: Source) -> tuple[list[tuple[str, Result]], list[str]]:
    """Return the results with their names, and what is said of files that are none."""
    if isinstance(source, Result):
        convention = source.convention
        return [(f"{convention.method.replace('_', ' ')} · {convention.data}", source)], []
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("there are no results to report. Name at least one.")
        return list(source.items()), []
    if isinstance(source, SweepRun):
        return _of_run(source)
    place = Path(source)
    if not place.is_dir():
        return [(place.stem, load_result(place))], []
    return _of_folder(place)


def _of_run(run: SweepRun) -> tuple[list[tuple[str, Result]], list[str]]:
    """Return what is done of a run, call by call, named by what tells the calls apart."""
    done = run.results()
    if not len(done):
        raise ValueError(
            f"nothing is done in {run.folder} yet, so there is nothing to report. "
            "Run its spec first."
        )
    labels = telling([each.item for each in done])
    differ = {
        name for told in labels for name in told if len({str(t.get(name)) for t in labels}) > 1
    }
    found, left_out = [], []
    for each, told in zip(list(done)[:_MOST_CALLS], labels, strict=False):
        words = [str(each.item.method).replace("_", " "), str(each.item.labels["data"])]
        words += [
            f"{name} {value}"
            for name, value in told.items()
            if name in differ - {"method", "data"} and value is not None
        ]
        name = " · ".join(word for word in words if word)
        found.append((name, each.result))
        if not each.complete:
            left_out.append(f"{name}: parts of it are not done yet.")
    if len(done) > _MOST_CALLS:
        left_out.append(
            f"{len(done) - _MOST_CALLS} more calls of the run. mi.report takes them, too: "
            "run = mi.open_run(folder), then run.results(method=..., site=...)[0].result."
        )
    return found, left_out


def _of_folder(place: Path) -> tuple[list[tuple[str, Result]], list[str]]:
    found, left_out = [], []
    for each in sorted(place.rglob("*.nc")):
        name = str(each.relative_to(place).with_suffix(""))
        try:
            found.append((name, load_result(each)))
        except ValueError as error:
            left_out.append(str(error))
    if not found:
        what = f": {left_out[0]}" if left_out else ", that is no .nc file that save() wrote."
        raise ValueError(f"the folder {place} has no results{what}")
    return found, left_out
