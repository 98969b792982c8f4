"""Where webhooks may go: addresses, names, schemes, and what the operator lets in."""

from __future__ import annotations

import ipaddress
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batch_app.config import Settings
from batch_app.errors import BadRequest
from batch_app.webhook_targets import TargetRefused, WebhookTargets, is_public, requested_webhook

PUBLIC = ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.9.10",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",  # metadata of clouds
    "100.64.0.1",  # carriers' own; a cloud's metadata at 100.100.100.200
    "100.100.100.200",
    "192.0.0.192",
    "198.18.0.1",
    "192.0.2.1",
    "203.0.113.7",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",  # metadata again
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:7f00:1::f5ff:fffe",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    targets = WebhookTargets((), lambda host, port: ["8.8.8.8", address])
    with pytest.raises(TargetRefused) as refusal:
        targets.target("https://hook.example/")  # one bad address among several is enough
    assert address not in str(refusal.value)


def no_look(host: str, port: int) -> list[str]:
    raise AssertionError("looked up")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "https://127.0.0.1/",
        "https://[::1]:8443/x",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::ffff:10.0.0.1]/",
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "https:///path",
        "https://",
        "//example.org/",
        "example.org",
        "https://user:word@example.org/",
        "https://user@example.org/",
        "https://example.org/#part",
        "https://example.org:0/",
        "https://example.org:99999/",
        "https://exa mple.org/",
        "https://example.org/\r\nHost: evil",
        "https://example.org/" + "a" * 2048,
        "https://[not-an-address]/",
        "",
    ],
)
def test_urls_that_are_refused_before_anything_is_looked_up(url: str) -> None:
    with pytest.raises(TargetRefused):
        WebhookTargets((), no_look).check(url)
    with pytest.raises(TargetRefused):
        WebhookTargets((), lambda host, port: ["127.0.0.1"]).target(url)


@pytest.mark.parametrize(
    "url", ["https://127.1/", "https://2130706433/", "https://0x7f.1/", "https://localhost/"]
)
def test_other_ways_to_write_an_address_are_judged_by_what_they_mean(url: str) -> None:
    with pytest.raises((TargetRefused, socket.gaierror)):
        WebhookTargets(()).target(url)


def test_a_name_is_looked_up_once() -> None:
    answers = [["93.184.215.14", "2606:4700::1111"], ["127.0.0.1"]]
    targets = WebhookTargets((), lambda host, port: answers.pop(0))
    target = targets.target("https://hook.example:8443/a?b=c")
    assert target.addresses == ("93.184.215.14", "2606:4700::1111")
    assert target.url.host == "hook.example"
    with pytest.raises(TargetRefused):  # the next attempt asks again
        targets.target("https://hook.example:8443/a?b=c")


@pytest.mark.parametrize(
    ("allowed", "url", "address"),
    [
        ("10.0.0.0/8", "http://hook.intranet/", "10.1.2.3"),
        ("10.1.2.3", "https://hook.intranet/", "10.1.2.3"),
        ("hook.intranet", "http://hook.intranet:8080/", "192.168.1.1"),
        ("HOOK.intranet.", "http://hook.INTRANET/", "192.168.1.1"),
        ("127.0.0.1", "http://127.0.0.1:99/", "127.0.0.1"),
        ("fd00::/8", "http://hook.intranet/", "fd00::1"),
        ("127.0.0.0/8", "http://hook.intranet/", "::ffff:127.0.0.1"),
    ],
)
def test_what_the_operator_lets_in(allowed: str, url: str, address: str) -> None:
    target = WebhookTargets([allowed], lambda host, port: [address]).target(url)
    assert target.addresses == (address,)


@pytest.mark.parametrize(
    ("allowed", "url", "address"),
    [
        ("10.0.0.0/8", "https://hook.intranet/", "192.168.1.1"),
        ("hook.intranet", "https://other.intranet/", "10.0.0.1"),
        ("hook.intranet", "https://hook.intranet.example/", "10.0.0.1"),
        ("10.0.0.0/8", "http://hook.example/", "8.8.8.8"),
    ],
)
def test_what_that_does_not_let_in(allowed: str, url: str, address: str) -> None:
    with pytest.raises(TargetRefused):
        WebhookTargets([allowed], lambda host, port: [address]).target(url)


def test_what_is_asked_for(tmp_path: Path) -> None:
    settings, now = Settings(data_dir=tmp_path), datetime.now(UTC)
    made = requested_webhook(
        settings, "https://example.org/x", now, owner="ana", events=["batch.failed"] * 2
    )
    assert made.events == ("batch.failed",)
    assert made.secret.startswith("whsec_")
    mine = "whsec_" + "A" * 40
    assert requested_webhook(settings, made.url, now, owner=None, secret=mine).secret == mine
    for url, secret, param in [
        ("http://example.org/", None, "webhook_url"),
        ("https://example.org/", "whsec_short", "webhook_secret"),
    ]:
        with pytest.raises(BadRequest) as refusal:
            requested_webhook(settings, url, now, owner=None, secret=secret, prefix="webhook_")
        assert refusal.value.param == param
