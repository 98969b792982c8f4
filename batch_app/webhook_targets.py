"""Where webhooks may go: to public addresses by https, and where the operator allows it.

A name is resolved once for each attempt. Every address it has is checked, and the connection goes
to one of those, so that a name can't mean one thing when it is checked and another when it is used.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

import httpx

from batch_app.config import Settings
from batch_app.errors import BadRequest
from batch_app.webhooks import EVENT_TYPES, Webhook, is_secret, new_secret, new_webhook_id

MAX_URL_CHARS = 2048
_SCHEMES = {"https": 443, "http": 80}
#: IPv6 addresses whose last bits are an IPv4 address that is what matters.
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
#: For protocols, a cloud's metadata at 192.0.0.192 among them; not every Python knows them.
_SPECIAL = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv4Network("192.88.99.0/24"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]


class TargetRefused(Exception):
    """This target may not be asked. The message shows no address of the network it is in."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where an attempt connects to (`addresses`, any of them), and under which name."""

    url: httpx.URL
    addresses: tuple[str, ...]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: Address) -> bool:
    """Whether this is an address of the public internet, and of one machine of it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address.teredo is not None:
            inner = address.teredo[1]
        if inner is None and any(address in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    elif any(address in network for network in _SPECIAL):
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


class WebhookTargets:
    """The rule. `allowed`: host names, addresses and networks that the operator lets in."""

    def __init__(self, allowed: Iterable[str], resolve: Resolve = resolve) -> None:
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._resolve = resolve
        for entry in allowed:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._names.add(entry.lower().rstrip("."))

    def check(self, text: str) -> None:
        """Raises TargetRefused where a URL can't be used, or may not. Resolves nothing."""
        url = self._parsed(text)
        self._require_allowed(url, self._literal(url.host))

    def target(self, text: str) -> Target:
        """Resolve and check. Raises TargetRefused, or OSError where the name can't be resolved."""
        url = self._parsed(text)
        port = url.port or _SCHEMES[url.scheme]
        found = self._resolve(url.host, port)
        if not found:
            raise OSError("The name has no address.")
        for address in found:
            self._require_allowed(url, ipaddress.ip_address(address.split("%")[0]))
        return Target(url, tuple(found))

    def _require_allowed(self, url: httpx.URL, address: Address | None) -> None:
        if self._is_listed(url.host, address):
            return
        if url.scheme != "https":
            raise TargetRefused(
                "A webhook's URL must begin with https://, unless its host is among the server's "
                "webhook_allowed_hosts."
            )
        if address is not None and not is_public(address):
            raise TargetRefused(
                "The webhook's host is not a public address. Whoever runs the server can allow it "
                "(webhook_allowed_hosts)."
            )

    def _is_listed(self, host: str, address: Address | None) -> bool:
        if host.lower().rstrip(".") in self._names:
            return True
        mapped = getattr(address, "ipv4_mapped", None)
        return address is not None and any((mapped or address) in net for net in self._networks)

    @staticmethod
    def _literal(host: str) -> Address | None:
        """The address, where the host is written as one."""
        try:
            return ipaddress.ip_address(host)
        except ValueError:
            return None

    @staticmethod
    def _parsed(text: str) -> httpx.URL:
        if len(text) > MAX_URL_CHARS or not text.isprintable() or " " in text:
            raise TargetRefused(
                f"A webhook's URL has at most {MAX_URL_CHARS} characters, and no blanks."
            )
        try:
            url = httpx.URL(text)
            usable = url.scheme in _SCHEMES and bool(url.host)
        except (httpx.InvalidURL, UnicodeError, ValueError):
            usable = False
        if not usable:
            raise TargetRefused("A webhook's URL looks like https://example.org/path.")
        if url.userinfo or url.fragment:
            raise TargetRefused("A webhook's URL has no user name, password or fragment.")
        if url.port is not None and not 0 < url.port < 65536:
            raise TargetRefused("A webhook's URL has a port from 1 to 65535.")
        return url


def requested_webhook(
    settings: Settings,
    url: str,
    now: datetime,
    *,
    owner: str | None,
    secret: str | None = None,
    batch_id: str | None = None,
    events: Iterable[str] | None = None,
    prefix: str = "",
) -> Webhook:
    """What somebody asked for, with a secret made where they gave none.

    Raises BadRequest; its `param` is `url` or `secret` after the prefix.
    """
    try:
        WebhookTargets(settings.webhook_allowed_hosts).check(url)
    except TargetRefused as refused:
        raise BadRequest(str(refused), code="invalid_webhook_url", param=f"{prefix}url") from None
    if secret is not None and not is_secret(secret):
        raise BadRequest(
            "A webhook's secret is whsec_ and 24 to 64 bytes in base64.",
            code="invalid_webhook_secret",
            param=f"{prefix}secret",
        )
    wanted = EVENT_TYPES if events is None else tuple(sorted(set(events)))
    return Webhook(
        id=new_webhook_id(),
        url=url,
        secret=secret or new_secret(),
        created_at=now,
        owner=owner,
        batch_id=batch_id,
        events=wanted,
    )
