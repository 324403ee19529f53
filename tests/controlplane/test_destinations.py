"""Where webhooks may go, as tables."""

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.destinations import Refused, Rules, host_of, refusal

STRICT = Rules()


@pytest.mark.parametrize(
    ("address", "what"),
    [
        # Public.
        ("1.1.1.1", ""),
        ("93.184.216.34", ""),
        ("100.63.255.255", ""),
        ("100.128.0.0", ""),
        ("172.15.255.255", ""),
        ("172.32.0.1", ""),
        ("192.0.1.1", ""),
        ("198.20.0.1", ""),
        ("223.255.255.255", ""),
        ("2606:2800:220:1:248:1893:25c8:1946", ""),
        ("2a00:1450:4001::1", ""),
        ("::ffff:1.1.1.1", ""),
        ("64:ff9b::101:101", ""),
        # IPv4.
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "private to a carrier"),
        ("100.127.255.255", "private to a carrier"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("169.254.169.254", "link-local"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.1", "reserved"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "reserved"),
        ("192.168.1.1", "private"),
        ("198.18.0.1", "benchmarking"),
        ("198.19.255.255", "benchmarking"),
        ("198.51.100.1", "documentation"),
        ("203.0.113.1", "documentation"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        # IPv6.
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fec0::1", "private"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "private"),
        ("ff02::1", "multicast"),
        ("100::1", "reserved"),
        ("2001::1", "reserved"),
        ("2001:db8::1", "documentation"),
        ("2002:7f00:1::", "a tunnel"),
        ("3fff::1", "documentation"),
        ("4000::1", "reserved"),
        ("64:ff9b:1::a00:1", "reserved"),
        # IPv4 within IPv6.
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:169.254.169.254", "link-local"),
        ("::ffff:0.0.0.0", "unspecified"),
        ("::7f00:1", "reserved"),
        ("64:ff9b::10.0.0.1", "private"),
        ("64:ff9b::7f00:1", "loopback"),
    ],
)
def test_addresses(address: str, what: str) -> None:
    assert refusal(ipaddress.ip_address(address), STRICT) == what


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_however_it_is_written(address: ipaddress.IPv4Address) -> None:
    plain = refusal(address, STRICT)
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        assert refusal(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(address)), STRICT) == plain
    # What Python's own table knows not to be public is not: ours may be stricter.
    if not address.is_global or address.is_multicast:
        assert plain


@given(st.ip_addresses(v=6))
def test_no_ipv6_address_is_public_that_python_does_not_think_so(address: ipaddress.IPv6Address) -> None:
    if not refusal(address, STRICT) and address not in ipaddress.IPv6Network("64:ff9b::/96"):
        assert address.ipv4_mapped or (address.is_global and not address.is_multicast)


def test_operator_may_allow_more() -> None:
    rules = Rules(networks=(ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/8")))
    for address, allowed in (
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("10.2.0.1", False),
        ("fd00::1", True),
        ("fc00::1", False),
        ("127.0.0.1", False),
    ):
        assert (refusal(ipaddress.ip_address(address), rules) == "") is allowed, address


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://example.com", "example.com"),
        ("https://Example.COM:8443/a/b?c=d&e=%20", "example.com"),
        ("https://example.com./", "example.com."),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://a_b.example/", "a_b.example"),
        ("https://1.1.1.1/", "1.1.1.1"),
        ("https://[2a00:1450:4001::1]:444/", "2a00:1450:4001::1"),
        ("https://inside/", "inside"),
    ],
)
def test_urls(url: str, host: str) -> None:
    assert host_of(url, STRICT) == host


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "https://"),
        ("example.com/x", "https://"),
        ("http://example.com/x", "https://"),
        ("file:///etc/passwd", "https://"),
        ("gopher://example.com/", "https://"),
        ("https://", "no URL"),
        ("https:///path", "no URL"),
        ("https://:443/", "no URL"),
        ("https://example.com:0/", "no URL"),
        ("https://example.com:65536/", "no URL"),
        ("https://example.com:x/", "no URL"),
        ("https://[::1", "no URL"),
        ("https://[::1]/", "loopback"),
        ("https://[::]/", "unspecified"),
        ("https://0/", "unspecified"),
        ("https://127.1/", "loopback"),
        ("https://0x7f000001/", "loopback"),
        ("https://0177.0.0.1/", "loopback"),
        ("https://2130706433/", "loopback"),
        ("https://127.0.0.1./", "loopback"),
        ("https://localhost/", "loopback"),
        ("https://LOCALHOST./", "loopback"),
        ("https://a.localhost/", "loopback"),
        ("https://10.0.0.1:8080/", "private"),
        ("https://169.254.169.254/", "link-local"),
        ("https://user@example.com/", "credentials"),
        ("https://user:password@example.com/", "credentials"),
        ("https://@example.com/", "credentials"),
        ("https://example.com/#a", "fragment"),
        ("https://example.com/a b", "character"),
        ("https://example.com/\n", "character"),
        ("https://example.com\\@127.0.0.1/", "character"),
        ("https://bücher.example/", "character"),
        ("https://exa%6Dple.com/", "xn--"),
        ("https://-a.example/", "xn--"),
        ("https://a..example/", "xn--"),
        ("https://example.com/" + "a" * 2048, "2048"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        host_of(url, STRICT)


def test_http_where_it_is_allowed() -> None:
    assert host_of("http://example.com/", Rules(http=True)) == "example.com"
    with pytest.raises(Refused, match="http:// or https://"):
        host_of("ftp://example.com/", Rules(http=True))
    here = Rules(networks=(ipaddress.ip_network("127.0.0.0/8"),))
    assert host_of("https://localhost:1/", here) == "localhost"


@given(st.text(max_size=100))
def test_whatever_is_sent_is_judged(text: str) -> None:
    for url in (text, f"https://{text}", f"https://{text}/", f"https://[{text}]/"):
        with contextlib.suppress(Refused):
            assert host_of(url, STRICT)
