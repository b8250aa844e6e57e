"""What the documentation site adds to MkDocs: files outside docs/, and docstrings in Markdown.

The pages are written for GitHub, so they link to files anywhere in the repository. The README is
the home page. What a page links to outside docs/ becomes a part of the site: Markdown as pages,
pictures and tables as they are, other files as pages that show their text, folders as lists. So all
links work without a network, and show the files of the same version.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments.lexers import find_lexer_class_for_filename

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+(?=[)#])")  # without its anchor
AS_IS = {".csv", ".png", ".svg"}
# The search has no entries of it.
SHOWN = "---\nsearch: {{exclude: true}}\n---\n# {path}\n\n{text}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and what pages link to, and what those link to."""
    files.append(_file("README.md", config))
    pages = list(files.documentation_pages())
    for page in pages:
        for link in LINK.findall(page.content_string):
            path = _linked(page.src_uri, link)
            if path and files.get_file_from_path(_uri(path)) is None:
                files.append(_file(path, config))
                if _uri(path).endswith(".md"):
                    pages.append(files.src_uris[_uri(path)])
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make links between files of the repository links between pages of the site."""
    here = page.file.src_uri

    def in_site(link: re.Match[str]) -> str:
        path = _linked(here, link[0])
        return relpath(_uri(path), dirname(here) or ".") if path else link[0]

    return LINK.sub(in_site, markdown)


def _origin(uri: str) -> str | None:
    """The file of the repository that a page shows, if its links are those of that file."""
    paths = ["README.md"] if uri == "index.md" else [f"docs/{uri}", uri]
    return next((path for path in paths if (ROOT / path).is_file()), None)


def _linked(uri: str, link: str) -> str | None:
    """The path in the repository that a page links to, if there is one."""
    origin = _origin(uri)
    path = normpath(join(dirname(origin), link)) if origin else ""
    return path if path and not path.startswith("..") and (ROOT / path).exists() else None


def _uri(path: str) -> str:
    """Where a file of the repository is among the sources of the site."""
    if path == "README.md":
        return "index.md"
    uri = path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{uri}/index.md"
    return uri if uri != path or Path(path).suffix in {".md", *AS_IS} else f"{path}.md"


def _file(path: str, config: MkDocsConfig) -> File:
    where, uri = ROOT / path, _uri(path)
    level = InclusionLevel.UNDEFINED if uri == "index.md" else InclusionLevel.NOT_IN_NAV
    if where.is_file() and where.suffix in {".md", *AS_IS}:
        return File.generated(config, uri, abs_src_path=str(where), inclusion=level)
    if where.is_dir():
        names = sorted(x.name for x in where.iterdir() if not x.name.startswith(("_", ".")))
        text = "\n".join(f"- {name}" for name in names)
    else:
        lexer = find_lexer_class_for_filename(path)
        language = lexer.aliases[0] if lexer else "text"
        text = f"````{language}\n{where.read_text()}\n````"
    return File.generated(config, uri, content=SHOWN.format(path=path, text=text), inclusion=level)


class Docstrings(Extension):
    """Docstrings in Markdown. They are written with Sphinx's roles, and examples at a prompt."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r":(?:class|func|meth|mod):(`[^`]+`)", r"\1", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            text = re.sub(r"((?:^>>> .*\n?)+)", r"```pycon\n\1```\n", text, flags=re.MULTILINE)
            obj.docstring.value = text
