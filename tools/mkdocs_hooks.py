"""MkDocs hooks: add the repository's files that pages link to, and warn about assets from other hosts.

Pages link to files outside docs/ by relative paths, such as ../endpoint/online/blue.yml, so that the links also work in
a browser of the repository. The hooks copy these files, and the files that those link to, to repository/ in the site. A
link to a missing file is a warning, which fails `mkdocs build --strict`.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "repository"
log = logging.getLogger("mkdocs.hooks")

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_ASSET = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:)?//|<link\b[^>]*\brel="(?:stylesheet|preload)"[^>]*\bhref="(https?:)?//'
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that pages link to."""
    pages = [(f"docs/{file.src_uri}", Path(str(file.abs_src_path))) for file in files if file.src_uri.endswith(".md")]
    while pages:
        name, path = pages.pop()
        for target in _outside(name, path.read_text(encoding="utf-8")):
            uri = f"{FOLDER}/{target}"
            source = ROOT / target
            if files.get_file_from_path(uri) is not None or not source.is_file():
                continue  # MkDocs reports the broken link of a missing file
            file = File.generated(config, uri, abs_src_path=str(source))
            files.append(file)
            if target.endswith(".md"):
                pages.append((target, source))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite links to files of the repository to their copies in the site."""
    uri = page.file.src_uri
    name = uri.removeprefix(f"{FOLDER}/") if uri.startswith(f"{FOLDER}/") else f"docs/{uri}"

    def replace(match: re.Match[str]) -> str:
        target = _target(name, match[2])
        if target is None:
            return match[0]
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif (ROOT / target).is_dir():
            log.warning("%s links to the folder %s; link to a file in it", name, target)
            return match[0]
        else:
            target = f"{FOLDER}/{target}"
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(uri) or '.')}{match[3]}"

    return _LINK.sub(replace, markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Warn about anything that a browser would load from another host."""
    if _ASSET.search(output):
        log.warning("%s loads something from another host", page.file.src_uri)
    return output


def _outside(name: str, text: str) -> list[str]:
    """Return the files outside docs/ that a page links to, as paths in the repository."""
    targets = (_target(name, match[2]) for match in _LINK.finditer(text))
    return [target for target in targets if target is not None and not target.startswith("docs/")]


def _target(name: str, link: str) -> str | None:
    """Return the path in the repository of a link on the page `name`; None for other links."""
    if ":" in link or link.startswith(("/", "#", "<")):
        return None
    target: Any = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return None if target.startswith("..") else target
