"""The user's settings for the web beyond this machine: proxies and certificates, as environment variables give them.

The local servers need neither, and some clients fail at once if such a variable cannot be used, whichever server is
asked. So these variables leave the environment where all servers are local, and `CONVOY_WEB` keeps them for what is
fetched from the web.
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

KEPT = "CONVOY_WEB"  # the variables that were taken out of the environment, as JSON
FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
FOLDERS = ("SSL_CERT_DIR",)
KEY_LOG = "SSLKEYLOGFILE"  # Python's ssl opens it for every context
NO_PROXY = ("NO_PROXY", "no_proxy")
PROXY_SCHEMES = ("http", "https")


def is_web(name: str) -> bool:
    """Returns whether a variable says how to reach the web."""
    return name.lower().endswith("_proxy") or name in (*FILES, *FOLDERS, KEY_LOG)


def without_web(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without these variables, which `CONVOY_WEB` keeps, as it does those removed earlier."""
    taken = {name: value for name, value in environment.items() if is_web(name)}
    rest = {name: value for name, value in environment.items() if name not in taken}
    if set(taken) - set(NO_PROXY):
        rest[KEPT] = json.dumps(taken)
    return rest


def web_environment() -> dict[str, str]:
    """Returns the user's variables for the web: those of the environment, or those that were taken out of it."""
    if kept := os.environ.get(KEPT):
        return {str(name): str(value) for name, value in json.loads(kept).items()}
    return {name: value for name, value in os.environ.items() if is_web(name)}


def usable_web_environment() -> dict[str, str]:
    """Returns the same without those that cannot be used, for a server that may ask the web later."""
    return {name: value for name, value in web_environment().items() if not _fault(name, value)}


def check_web_environment(environment: Mapping[str, str] | None = None) -> None:
    """Checks these variables, since one that cannot be used fails some clients with an error that does not name it.

    Args:
        environment: the process's own if None.

    Raises:
        UsageError: one cannot be used; the message names it, and holds no password of a proxy.
    """
    for name, value in (os.environ if environment is None else environment).items():
        if fault := _fault(name, value):
            raise UsageError(f"{name} {fault}: correct it, or unset it")


def loopback_without_proxy(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns variables that keep requests to this machine away from a proxy that the user may have set.

    Entries that httpx cannot read end every client of it, so `[::1]` loses its brackets, and networks of IPv6, which
    no client of ours understands, are left out.
    """
    environment = os.environ if environment is None else environment
    set_so_far = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host.strip().removeprefix("[").removesuffix("]") for host in set_so_far.split(",")]
    hosts = [host for host in hosts if host and _httpx_reads(host)]
    hosts += [host for host in ("127.0.0.1", "localhost") if host not in hosts]
    return dict.fromkeys(NO_PROXY, ",".join(hosts))


def proxy_of(url: str) -> tuple[str, str] | None:
    """Returns the proxy that the user wants for an address, with the name of its variable; None for none.

    Raises:
        UsageError: it cannot be used.
    """
    proxies: dict[str, tuple[str, str]] = {}
    found = web_environment()
    for name in sorted(found):  # those in small letters win, as everywhere
        if name.lower().endswith("_proxy"):
            proxies[name.lower().removesuffix("_proxy")] = (name, found[name])
    if not set(proxies) - {"no"}:  # some systems keep them elsewhere
        proxies |= {kind: (f"{kind} proxy", value) for kind, value in urllib.request.getproxies().items()}
    parts = urlsplit(url)
    name, value = proxies.get(parts.scheme) or proxies.get("all") or ("", "")
    rules = {"no": loopback_without_proxy(found)["no_proxy"]}
    if not value or urllib.request.proxy_bypass_environment(parts.hostname or "", rules):  # type: ignore[attr-defined]
        return None
    check_web_environment({name: value})
    return name, _with_scheme(value)


def certificates() -> ssl.SSLContext | Literal[True]:
    """Returns the certificates that the user wants to be trusted on the web; True for the usual ones.

    Raises:
        UsageError: they cannot be read.
    """
    found = {name: value for name, value in web_environment().items() if name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    check_web_environment(found)
    file, folder = found.get("SSL_CERT_FILE") or None, found.get("SSL_CERT_DIR") or None
    return ssl.create_default_context(cafile=file, capath=folder) if file or folder else True


class WebTransport(httpx.BaseTransport):
    """Sends each request the way that the user's settings for the web want it sent; safe to share between threads."""

    def __init__(self) -> None:
        self._ways: dict[tuple[str, str | None], httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        found = proxy_of(str(request.url))
        way = request.url.scheme, found[1] if found else None
        if way not in self._ways:
            verify = certificates() if request.url.scheme == "https" else True
            # Of two threads that come here at once, one transport wins; the other closes with its last connection.
            self._ways.setdefault(way, httpx.HTTPTransport(proxy=way[1], verify=verify, trust_env=False))
        return self._ways[way].handle_request(request)

    def close(self) -> None:
        for way in self._ways.values():
            way.close()


def _fault(name: str, value: str) -> str:
    """Returns what is wrong with a variable's value; empty if nothing is."""
    if not value or not is_web(name):
        return ""
    if name.lower().endswith("_proxy"):
        return _proxy_fault(name, value)
    path = Path(value)
    if name == "SSL_CERT_FILE":
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=value)
        except OSError as error:
            return f"names {value}, which holds no certificates that can be read ({error.strerror or error})"
    elif name in FILES and not path.exists():
        return f"names {value}, which is not there"
    elif name in FOLDERS and not path.is_dir():
        return f"names {value}, which is no folder"
    elif name == KEY_LOG and not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"names {value}, which cannot be written"
    return ""


def _proxy_fault(name: str, value: str) -> str:
    if name.lower() not in ("http_proxy", "https_proxy", "all_proxy"):
        return ""  # of protocols that Convoy does not use
    try:
        parts = urlsplit(_with_scheme(value))
        _ = parts.port
    except ValueError:
        return "is no address of a proxy"
    if parts.scheme.startswith("socks"):
        known = parts.scheme in ("socks5", "socks5h") and importlib.util.find_spec("socksio")
        return "" if known else "names a SOCKS proxy, which cannot be used; name one of http:// or https://"
    if parts.scheme not in PROXY_SCHEMES or not parts.hostname:
        return "names a proxy whose address does not start with http:// or https://"
    return ""


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _httpx_reads(host: str) -> bool:
    """Returns whether httpx can make a pattern of an entry of NO_PROXY, as it does for every client."""
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
