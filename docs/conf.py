"""How the documentation site is built: ``make docs``."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from pydantic import BaseModel
from sphinx.application import Sphinx

project = "gradclip"
author = "The gradclip contributors"
release = metadata.version("gradclip")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # a link may name a heading, as on GitHub

autodoc_default_options = {"exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_use_ivar = True  # else an attribute that is a property is described twice
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = f"gradclip {release}"
html_show_sphinx = False
html_search_scorer = str(Path(__file__).with_name("search_scorer.js"))
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "


def setup(app: Sphinx) -> None:
    """Show the types of a configuration's fields as they are written, without their checks."""
    app.connect("autodoc-process-docstring", _plain_types)


def _plain_types(_app: Sphinx, what: str, _name: str, documented: Any, *_rest: object) -> None:
    if what == "class" and issubclass(documented, BaseModel):
        checked = {name: field.annotation for name, field in documented.model_fields.items()}
        plain = get_type_hints(SimpleNamespace(__annotations__=checked))
        for owner in documented.__mro__:
            own = vars(owner).get("__annotations__", {})
            own.update({name: plain[name] for name in own if name in plain})
