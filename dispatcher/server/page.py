"""The page for people and its parts: files of the package, the same for everybody."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from aiohttp import hdrs, web

PAGE = "page.html"
OPEN_PAGE = "open.html"
"""The page of a server that asks for no token, so that it asks for none either."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # It is asked again each time whether a file changed: a server may be a newer one.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    headers: dict[str, str]


class PageFiles:
    """The files of the page, read once. No other name is served, wherever it may lead."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        for entry in files("dispatcher.server").joinpath("dashboard").iterdir():
            suffix = entry.name[entry.name.rfind(".") :]
            if suffix in _TYPES:
                self._add(entry.name, _TYPES[suffix], entry.read_bytes())
        page = self._files[PAGE].body.replace(b'data-token="wanted"', b'data-token="none"')
        self._add(OPEN_PAGE, _TYPES[".html"], page)

    def _add(self, name: str, content_type: str, body: bytes) -> None:
        tag = f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'
        self._files[name] = _File(body, {**_HEADERS, "Content-Type": content_type, "ETag": tag})

    def reply(self, request: web.Request, name: str) -> web.Response:
        """Return a file; 304 to a browser that has it. Raises HTTPNotFound for what is none."""
        file = self._files.get(name)
        if file is None:
            raise web.HTTPNotFound
        known = request.headers.get(hdrs.IF_NONE_MATCH, "")
        if file.headers["ETag"] in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
            return web.Response(status=304, headers=file.headers)
        return web.Response(body=file.body, headers=file.headers)
