"""The page: sections rendered by a template that escapes, with all it needs inside.

Two walls keep a prompt from running as script: everything is escaped, data as JSON without
``<``, ``>`` and ``&``, and the page's content security policy lets nothing run but the scripts
whose digests it names, and nothing load from anywhere.
"""

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mechinterp._version import __version__
from mechinterp.html import about, words_of
from mechinterp.report.panels import Panel, Picture, as_json
from mechinterp.results import Result

_SCRIPTS = ("d3.min.js", "plot.umd.min.js", "base.js", "charts.js", "tables.js", "tokens.js")
_LICENCES = ("LICENSE.d3", "LICENSE.plot")


@dataclass(frozen=True)
class Section:
    """One result: its name in the table of contents and its panels."""

    name: str
    result: Result
    panels: Sequence[Panel]

    @property
    def title(self) -> str:
        """What kind of result it is, in words."""
        return words_of(type(self.result).__name__)

    @property
    def told(self) -> list[tuple[str, str]]:
        """What a reader asks first."""
        return about(self.result.convention)

    @property
    def convention(self) -> str:
        """All of the convention, as indented JSON."""
        return json.dumps(json.loads(self.result.convention.to_json()), indent=1)


def page(sections: Sequence[Section], title: str, said: str, left_out: Sequence[str]) -> str:
    """Return the whole HTML file.

    ``said`` is an account to begin with, as plain text; ``left_out`` are lines about files that
    could not be shown.
    """
    scripts = [Markup(_asset(name)) for name in _SCRIPTS]
    environment = Environment(
        loader=PackageLoader("mechinterp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template("report.html").render(
        title=title,
        said=said,
        sections=sections,
        left_out=left_out,
        version=__version__,
        licences=[_asset(name) for name in _LICENCES],
        style=Markup(_asset("report.css")),
        scripts=scripts,
        digests=[_digest(str(script)) for script in scripts],
        as_json=as_json,
        is_picture=lambda panel: isinstance(panel, Picture),
        base64=lambda data: b64encode(data).decode("ascii"),
    )


def _digest(script: str) -> str:
    """Return a script's digest as a content security policy names it."""
    return "sha256-" + b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")


@cache
def _asset(name: str) -> str:
    text = files("mechinterp.report").joinpath("assets", name).read_text(encoding="utf-8")
    assert "</script" not in text.lower() and "<!--" not in text
    return text
