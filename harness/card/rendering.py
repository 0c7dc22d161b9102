"""Templates to text: README.md, inference.py, requirements.txt."""

from __future__ import annotations

import pprint
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.card.facts import required
from harness.errors import HarnessError
from harness.report.document import escaped

FOLDER = Path(__file__).parent / "templates"
STYLES = ("origin", "hub", "vllm-ascend")


def environment(folder: Path | None = None, *, markdown: bool = True) -> Any:
    """jinja2's environment over a team's own folder, if there is one, and the templates that are here.

    A name that a template uses and nobody gives is an error, not a blank. In markdown a line with nothing but a tag
    leaves no line; in scripts the template says by "{%-" what it takes away.
    """
    jinja2 = required("jinja2")
    folders = [str(item) for item in (folder, FOLDER) if item is not None]
    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=markdown,
        lstrip_blocks=markdown,
        keep_trailing_newline=True,
    )
    result.filters |= {"literal": _literal, "cell": escaped, "fenced": _fenced}
    return result


def plain_name(name: str) -> str:
    """A name that is markup nowhere and code nowhere: letters, digits, dots, blanks, hyphens and underscores.

    >>> plain_name("bert(1); import os")
    'bert_1__ import os'
    """
    return re.sub(r"[^\w. -]", "_", name)


def _fenced(text: str) -> str:
    """Text in a block of code, which it cannot end."""
    return str(text).replace("`" * 3, "'" * 3)


def _literal(value: Any) -> str:
    return pprint.pformat(value, width=100, compact=True, sort_dicts=False)


def rendered(name: str, values: Mapping[str, Any], folder: Path | None = None) -> str:
    """A template with its values. Raises: HarnessError for one that is absent or cannot be rendered."""
    jinja2 = required("jinja2")
    try:
        text: str = environment(folder, markdown=".md" in name).get_template(name).render(**values)
    except jinja2.TemplateNotFound as error:
        raise HarnessError(f"there is no template {error.name}; give a folder with one, or one of {STYLES}") from None
    except jinja2.TemplateError as error:
        raise HarnessError(f"the template {_where(name, error)} cannot be rendered: {_one_line(error)}") from None
    return text


def compiled(style: str) -> None:
    """Compile the template of a README before anything is measured. Raises: HarnessError for one that does not."""
    name, folder = template_of(style)
    jinja2 = required("jinja2")
    try:
        environment(folder).get_template(name)
    except jinja2.TemplateError as error:
        raise HarnessError(f"the template {_where(name, error)} is not one: {_one_line(error)}") from None


def _where(name: str, error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return f"{name}, line {line}," if line else name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def template_of(style: str) -> tuple[str, Path | None]:
    """The template of a README and the folder that it lies in: of a style that is here, or a team's own file.

    Raises: HarnessError for neither.
    """
    if style in STYLES:
        return f"{style}.md.j2", None
    path = Path(style)
    if path.is_file():
        return path.name, path.parent
    raise HarnessError(f"--template {style} is neither one of {', '.join(STYLES)} nor a file of a template")
