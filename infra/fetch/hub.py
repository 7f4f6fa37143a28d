"""Fetches files of the Hugging Face Hub through `huggingface_hub`, with its settings and its cache.

It runs in a process of its own: its settings (HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, ...) are read when it is imported,
and it needs the user's proxies and certificates.
"""

import os
import re
import sys
from pathlib import Path

from infra.errors import ServiceError, one_line
from infra.fetch.packages import environment_for_web, run_program
from infra.fetch.web import Web

HUB_SECONDS = 3600
HUB_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its variables
ADDRESS = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<file>[\w.-]+)")
PROGRAM = """
import sys
from huggingface_hub import hf_hub_download
repository, file, revision = sys.argv[1:]
try:
    print(hf_hub_download(repository, file, revision=revision or None))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def endpoint() -> str:
    """Returns the Hub's address, or that of the mirror which the user has set."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_file(address: str, web: Web) -> Path:
    """Returns the file in the Hub's cache that `owner/name@revision/file` names; downloads it if it is not there.

    Args:
        address: without `@revision`, the newest one is meant; offline, the one in the cache.
        web: tells quickly whether the Hub can be reached. If not, only its cache is searched.

    Raises:
        ServiceError: the Hub cannot be reached or has no such file, and neither has its cache.
    """
    parts = ADDRESS.fullmatch(address)
    if not parts:
        raise ServiceError("write hf:OWNER/NAME@REVISION/FILE")
    environment, problem = environment_for_web() | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in HUB_TRUE:
        problem = "HF_HUB_OFFLINE is set, and it is not in the Hub's cache"
    else:
        try:
            web.require_host(endpoint())
        except ServiceError as error:
            environment["HF_HUB_OFFLINE"], problem = "1", f"{error}; nor is it in the Hub's cache"
    arguments = parts["repository"], parts["file"], parts["revision"] or ""
    program = [sys.executable, "-P", "-c", PROGRAM, *arguments]  # -P: not the working folder's modules
    done = run_program(program, what="it", seconds=HUB_SECONDS, environment=environment)
    if done.returncode:
        said = one_line(done.stderr.strip().rpartition("\n\n")[2]) or f"exit status {done.returncode}"
        raise ServiceError(problem or said)
    return Path(done.stdout.strip())


def revision_and_digest(path: Path) -> tuple[str, str | None]:
    """Returns the commit that a file in the Hub's cache is of, and the SHA-256 that the Hub states for it.

    The cache names content by the Hub's ETag, which is the SHA-256 of a large file; None if it is another digest.
    """
    stated = path.resolve().name
    return path.parent.name, stated if re.fullmatch(r"[0-9a-f]{64}", stated) else None
