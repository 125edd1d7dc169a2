"""Which requests of browsers the HTTP door answers: none of other sites, unless an option allows them.

A page in a browser can send requests to addresses that only the browser's machine reaches. Two rules stop it:

- The origin of the page must be the server's own, or one of `--cors-origin`.
- If the server does not authenticate its callers, the request must name it by a loopback host. Otherwise a page could be of
  the server's origin by a name of its own that leads to this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import urlsplit

from stepwell_server.errors import PermissionDenied, shorten

ANY = "*"
Headers = Sequence[tuple[str, str]]
_METHODS = "GET, POST, DELETE, OPTIONS"
_HEADERS = "authorization, content-type, grpc-timeout, stepwell-tenant, stepwell-session, traceparent"
_EXPOSED = "retry-after, www-authenticate"
_MAX_AGE_S = 86_400
#: Values of Sec-Fetch-Site of requests that a page of another site causes.
_OTHER_SITES = frozenset({"cross-site", "same-site"})
_MAX_SHOWN = 200


class OriginRules:
    """The rules for one HTTP address.

    Args:
        host: The host that the server listens on.
        origins: Origins whose pages may call; `*`: all.
        is_open: Whether the server does not authenticate its callers.
        scheme: http or https.
    """

    def __init__(self, host: str, origins: Collection[str], *, is_open: bool, scheme: str) -> None:
        self._origins = frozenset(origins)
        self._scheme = scheme
        self._checks_host = is_open and ANY not in self._origins
        self._hosts = {urlsplit(origin).hostname or "" for origin in self._origins}
        if not _is_wildcard(host):
            self._hosts.add(host.lower())

    def require_allowed(self, headers: Mapping[str, str], authority: str, *, may_navigate: bool) -> None:
        """Check the host and the origin of a request.

        Args:
            headers: Its headers by lower-case name.
            authority: The host that it names, with the port.
            may_navigate: Whether the request only reads, so that a link on another site may lead to it.

        Raises:
            PermissionDenied: it breaks a rule.
        """
        if self._checks_host and not self._is_own_host(authority):
            raise PermissionDenied(
                "the Host of a request must be localhost or a loopback address, because the server does not authenticate"
                f" callers; --cors-origin allows others; got {shorten(authority, _MAX_SHOWN)!r}"
            )
        origin = headers.get("origin")
        if origin is None:
            self._require_own_site(headers, may_navigate=may_navigate)
        elif not (self.allows(origin) or origin.lower() == f"{self._scheme}://{authority.lower()}"):
            raise PermissionDenied(
                "the page's origin must be the server's own, or one that --cors-origin allows;"
                f" got {shorten(origin, _MAX_SHOWN)!r}"
            )

    def allows(self, origin: str) -> bool:
        """Whether `--cors-origin` allows the pages of an origin."""
        return ANY in self._origins or origin in self._origins

    def headers(self, origin: str | None) -> Headers:
        """Return the headers with which a browser shows an answer to the page of this origin."""
        if not self._origins:
            return ()
        if origin is None or not self.allows(origin):
            return (("vary", "origin"),)
        return (
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", _EXPOSED),
            ("vary", "origin"),
        )

    def preflight(self) -> Headers:
        """Return the further headers of the answer to a browser that asks whether a page of an allowed origin may call."""
        return (
            ("access-control-allow-methods", _METHODS),
            ("access-control-allow-headers", _HEADERS),
            ("access-control-max-age", str(_MAX_AGE_S)),
        )

    def _require_own_site(self, headers: Mapping[str, str], *, may_navigate: bool) -> None:
        """Browsers send no Origin with images, scripts and links, but say from which site the request comes."""
        site = headers.get("sec-fetch-site", "")
        is_link = may_navigate and headers.get("sec-fetch-mode") == "navigate"
        if site in _OTHER_SITES and not is_link and ANY not in self._origins:
            raise PermissionDenied(
                f"the page must be of the server's own site; got a request with Sec-Fetch-Site: {site}"
            )

    def _is_own_host(self, authority: str) -> bool:
        try:
            parts = urlsplit(f"//{authority}")
            host, _ = parts.hostname or "", parts.port  # raises if the port is no number
        except ValueError:
            return False
        return parts.username is None and (host in self._hosts or is_loopback(host))


def is_loopback(host: str) -> bool:
    """Whether a host always means this machine, whatever a name server says."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    found = _ip_address(host)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return found is not None and (mapped or found).is_loopback


def _is_wildcard(host: str) -> bool:
    found = _ip_address(host)
    return found is not None and found.is_unspecified


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
