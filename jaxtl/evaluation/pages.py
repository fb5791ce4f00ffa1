"""Pages for people: one file each, that needs no network, with the same looks and the same sortable tables.

Templates are in `templates/`: `page.html.j2` is the skeleton, `parts.html.j2` has figures and tables. Whatever comes
from data is escaped; what the page may do beside is limited by its Content-Security-Policy: run its own script, show
the images that are in it, and nothing else.
"""

import base64
import hashlib
import io
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

TINY = 64  # pixels of an image, up to which they are shown as squares

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxtl.evaluation"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Returns the page that a template of `templates/` makes of these values; strings in them are escaped."""
    script = _source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _ENVIRONMENT.get_template(template).render(
        **values, style=Markup(_source("page.css")), script=Markup(script), script_sha256=digest
    )


def thumbnail(image: Image.Image) -> str:
    """Returns an image as an address that holds it: small ones without loss, photographs as JPEG."""
    kind = "png" if max(image.size) <= TINY else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "png" else {"quality": 85}))
    return picture(file.getvalue(), kind)


def picture(data: bytes, kind: str) -> str:
    """Returns an image file as an address that holds it; `kind` is `png` or `jpeg`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _source(name: str) -> str:
    # Not rendered: in CSS and JavaScript braces mean something else.
    return _ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0]


_ENVIRONMENT.filters["number"] = lambda value, form="{:,}": "" if value is None else form.format(value)
