"""Where webhooks may go: to public addresses, over https, and elsewhere only where the operator says so.

A URL is judged when a task comes with it and again before each post; what decides is the address that is connected to,
which `receivers` has judged here at the moment it makes the socket, whatever a name server said before or says next.
"""

import ipaddress
import re
import socket
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import msgspec

from controlplane.errors import InvalidArgument

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

URL_BYTES: Final = 2048

#: IANA's registry of special-purpose IPv4 addresses: what of it is no public host.
_NOT_PUBLIC_4: Final = tuple(
    (ipaddress.IPv4Network(network), what)
    for network, what in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "private to a carrier"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "reserved"),
        ("192.52.193.0/24", "reserved"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "reserved"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
#: Of IPv6 only this is public at all ...
_GLOBAL_6: Final = ipaddress.IPv6Network("2000::/3")
#: ... less some of it: a tunnel's address has an IPv4 address in it that its relay, not we, would connect to.
_NOT_PUBLIC_6: Final = tuple(
    (ipaddress.IPv6Network(network), what)
    for network, what in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),
        ("ff00::/8", "multicast"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "a tunnel"),
        ("2620:4f:8000::/48", "reserved"),
        ("3fff::/20", "documentation"),
    )
)
#: Addresses of IPv4 written as IPv6: judged as what they are. The second is how IPv6-only networks reach IPv4.
_EMBEDDED: Final = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))

_NOT_IN_A_URL: Final = re.compile(r"[^\x21-\x7e]|[\\\"<>^`{|}]")
_HOST: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")


class Rules(msgspec.Struct, frozen=True):
    """What the operator allows besides: http, and networks that are not public."""

    http: bool = False
    networks: tuple[Network, ...] = ()


class Refused(InvalidArgument):
    """Webhooks may not go there."""


def host_of(url: str, rules: Rules) -> str:
    """The host of a URL that webhooks may go to, as far as the URL tells: lower case, an IPv6 address without brackets.

    Raises Refused.
    """
    if len(url) > URL_BYTES:
        raise Refused(f"callback_url: longer than {URL_BYTES} bytes.")
    if _NOT_IN_A_URL.search(url):
        raise Refused("callback_url: has a character that may not stand in a URL: percent-encode it.")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise Refused("callback_url: is no URL: give https://HOST/PATH.") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and rules.http):
        raise Refused(f"callback_url: must begin with {'http:// or ' if rules.http else ''}https://.")
    if parts.username is not None or parts.password is not None:
        raise Refused("callback_url: has credentials in it: webhooks are signed instead.")
    if not host or port == 0:
        raise Refused("callback_url: is no URL: give https://HOST/PATH.")
    if parts.fragment:
        raise Refused("callback_url: has a fragment (#), which never travels: leave it out.")
    if (address := _literal(host)) is not None:
        if what := refusal(address, rules):
            raise Refused(f"callback_url: its address is not public ({what}).")
    elif not _HOST.fullmatch(host):
        raise Refused("callback_url: its host is no name: write an international one in its xn-- form.")
    elif (host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")) and refusal(
        ipaddress.IPv4Address("127.0.0.1"), rules
    ):
        raise Refused("callback_url: its address is not public (loopback).")
    return host


def refusal(address: Address, rules: Rules) -> str:
    """Why webhooks may not go to the address, in a word or two; empty: they may."""
    plain = _plain(address)
    if any(plain.version == network.version and plain in network for network in rules.networks):
        return ""
    if isinstance(plain, ipaddress.IPv4Address):
        return next((what for network, what in _NOT_PUBLIC_4 if plain in network), "")
    otherwise = "" if plain in _GLOBAL_6 else "reserved"
    return next((what for network, what in _NOT_PUBLIC_6 if plain in network), otherwise)


def _plain(address: Address) -> Address:
    """The address that is meant."""
    if isinstance(address, ipaddress.IPv6Address) and any(address in network for network in _EMBEDDED):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _literal(host: str) -> Address | None:
    """The address that a host is, in every notation that some resolver takes (127.1, 0x7f000001, 2130706433)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except (OSError, ValueError):
        return None
