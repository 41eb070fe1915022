"""The site: `python -m sphinx -W --keep-going docs build/site`, with what the extra `docs` has."""

from sphinx.util.inspect import TypeAliasForwardRef

import rnnkern

project = "rnnkern"
author = "the rnnkern developers"
copyright = "the rnnkern developers"
version = release = rnnkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
highlight_language = "none"  # of a block that names none: shell commands, formulas

# Pages are Markdown that also reads well without the site.
myst_heading_anchors = 3

# Docstrings have the sections of numpydoc, and single backticks around code.
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # several names may share one text
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "DTypeLike")}
# Show a type alias by its name alone, where Sphinx 9 shows the object that stands for it.
TypeAliasForwardRef.__repr__ = lambda self: self.name

html_theme = "furo"
html_title = "rnnkern"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_domain_indices = False  # the index of names has the modules
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = ">>> |... "
copybutton_prompt_is_regexp = True
