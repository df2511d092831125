"""The playground: one static page, and headers that let it load nothing from another host."""

import base64
import functools
import hashlib
import re
from importlib.resources import files


@functools.cache
def page() -> bytes:
    """Return the page."""
    return files("mptserve.openai_server").joinpath("playground.html").read_bytes()


@functools.cache
def headers() -> dict[str, str]:
    """Return headers that allow only the page's own script and style, and connections to this server alone."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page(), flags=re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
