"""Reads the user's settings for the web beyond this machine from environment variables: proxies and certificates.

The local servers need neither, and some clients fail for every server if such a variable cannot be used. So if all
servers are local, these variables are removed from the environment, and `CONVOY_WEB` keeps them for downloads.
"""

import importlib.util
import json
import os
import ssl
import urllib.request
from collections.abc import Mapping
from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx

from infra.errors import UsageError

SAVED_VARIABLES = "CONVOY_WEB"  # holds the removed variables, as JSON
FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
FOLDERS = ("SSL_CERT_DIR",)
KEY_LOG = "SSLKEYLOGFILE"  # Python's ssl opens it for every context
NO_PROXY = ("NO_PROXY", "no_proxy")
PROXY_SCHEMES = ("http", "https")


def is_web(name: str) -> bool:
    """Returns whether a variable configures access to the web."""
    return name.lower().endswith("_proxy") or name in (*FILES, *FOLDERS, KEY_LOG)


def without_web(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without these variables, which `CONVOY_WEB` keeps, like those removed earlier."""
    taken = {name: value for name, value in environment.items() if is_web(name)}
    rest = {name: value for name, value in environment.items() if name not in taken}
    if set(taken) - set(NO_PROXY):
        rest[SAVED_VARIABLES] = json.dumps(taken)
    return rest


def web_environment() -> dict[str, str]:
    """Returns the user's variables for the web: those that were removed from the environment, else those in it."""
    if saved := os.environ.get(SAVED_VARIABLES):
        return {str(name): str(value) for name, value in json.loads(saved).items()}
    return {name: value for name, value in os.environ.items() if is_web(name)}


def usable_web_environment() -> dict[str, str]:
    """Returns the valid ones of these variables, for a server that may access the web later."""
    return {name: value for name, value in web_environment().items() if not _fault(name, value)}


def check_web_environment(environment: Mapping[str, str] | None = None) -> None:
    """Checks these variables, since an invalid one fails some clients with an error that does not name it.

    Args:
        environment: None takes that of this process.

    Raises:
        UsageError: a variable is invalid; the message names it, without a proxy's password.
    """
    for name, value in (os.environ if environment is None else environment).items():
        if fault := _fault(name, value):
            raise UsageError(f"{name} {fault}: correct it, or unset it")


def loopback_without_proxy(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns variables that exclude this machine from a proxy that the user may have set.

    An entry that httpx cannot read breaks every httpx client. So `[::1]` loses its brackets, and IPv6 networks, which
    none of our clients understands, are left out.
    """
    environment = os.environ if environment is None else environment
    set_so_far = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if set_so_far.strip() == "*":  # no proxy at all; clients do not know it among others
        return dict.fromkeys(NO_PROXY, "*")
    hosts = [host.strip().removeprefix("[").removesuffix("]") for host in set_so_far.split(",")]
    hosts = [host for host in hosts if host and _httpx_reads(host)]
    hosts += [host for host in ("127.0.0.1", "localhost") if host not in hosts]
    return dict.fromkeys(NO_PROXY, ",".join(hosts))


def proxy_of(url: str) -> tuple[str, str] | None:
    """Returns the variable and the address of the user's proxy for an address; None without a proxy.

    Raises:
        UsageError: the proxy's address is invalid.
    """
    proxies: dict[str, tuple[str, str]] = {}
    found = web_environment()
    for name in sorted(found):  # lower-case names take precedence, as in other programs
        if name.lower().endswith("_proxy"):
            proxies[name.lower().removesuffix("_proxy")] = (name, found[name])
    if not set(proxies) - {"no"}:  # some systems store proxies elsewhere
        proxies |= {kind: (f"{kind} proxy", value) for kind, value in urllib.request.getproxies().items()}
    parts = urlsplit(url)
    name, value = proxies.get(parts.scheme) or proxies.get("all") or ("", "")
    rules = {"no": loopback_without_proxy(found)["no_proxy"]}
    if not value or urllib.request.proxy_bypass_environment(parts.hostname or "", rules):  # type: ignore[attr-defined]
        return None
    check_web_environment({name: value})
    return name, _with_scheme(value)


def certificates() -> ssl.SSLContext | Literal[True]:
    """Returns the certificates that the user trusts for the web; True for the default ones.

    Raises:
        UsageError: they cannot be read.
    """
    found = {name: value for name, value in web_environment().items() if name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    check_web_environment(found)
    file, folder = found.get("SSL_CERT_FILE") or None, found.get("SSL_CERT_DIR") or None
    return ssl.create_default_context(cafile=file, capath=folder) if file or folder else True


class WebTransport(httpx.BaseTransport):
    """Sends each request by the user's settings for the web. Threads may share it."""

    def __init__(self) -> None:
        self._transports: dict[tuple[str, str | None], httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        found = proxy_of(str(request.url))
        route = request.url.scheme, found[1] if found else None
        if route not in self._transports:
            verify = certificates() if request.url.scheme == "https" else True
            # If two threads create a transport at the same time, one is kept; the other closes with its connection.
            self._transports.setdefault(route, httpx.HTTPTransport(proxy=route[1], verify=verify, trust_env=False))
        return self._transports[route].handle_request(request)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _fault(name: str, value: str) -> str:
    """Returns the error of a variable's value; empty if it is valid."""
    if not value or not is_web(name):
        return ""
    if name.lower().endswith("_proxy"):
        return _proxy_fault(name, value)
    path = Path(value)
    if name == "SSL_CERT_FILE":
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=value)
        except OSError as error:
            return f"names {value}, which has no readable certificates ({error.strerror or error})"
    elif name in FILES and not path.exists():
        return f"names {value}, which does not exist"
    elif name in FOLDERS and not path.is_dir():
        return f"names {value}, which is not a folder"
    elif name == KEY_LOG and not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"names {value}, which cannot be written"
    return ""


def _proxy_fault(name: str, value: str) -> str:
    if name.lower() not in ("http_proxy", "https_proxy", "all_proxy"):
        return ""  # Convoy does not use its protocol
    try:
        parts = urlsplit(_with_scheme(value))
        _ = parts.port
    except ValueError:
        return "is not an address of a proxy"
    if parts.scheme.startswith("socks"):
        known = parts.scheme in ("socks5", "socks5h") and importlib.util.find_spec("socksio")
        return "" if known else "names a SOCKS proxy, which is not supported; name one with http:// or https://"
    if parts.scheme not in PROXY_SCHEMES or not parts.hostname:
        return "names a proxy whose address does not start with http:// or https://"
    return ""


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _httpx_reads(host: str) -> bool:
    """Returns whether httpx accepts an entry of NO_PROXY: each client parses all of them."""
    try:
        IPv6Address(host.split("/")[0])
        address = f"all://[{host}]"
    except ValueError:
        address = host if "://" in host else f"all://*{host}"
    try:
        httpx.URL(address)
    except httpx.InvalidURL:
        return False
    return True
