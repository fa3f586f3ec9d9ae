"""Pages: a Jinja template and what it shows, as HTML."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def fill(template: Path, filters: Mapping[str, Callable[..., Any]], values: Mapping[str, Any]) -> str:
    """Return the page of a template; everything shown is escaped, and a name it lacks is an error.

    Args:
        template: the file; what it includes lies beside it.
        filters: functions that it calls by name.
        values: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters)
    return environment.get_template(template.name).render(values)
