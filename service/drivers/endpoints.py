"""Which store an address means here: the endpoint or the account that the environment sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_S3_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_S3_CONFIGURATION = (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials"))
_AZURE_SECRETS = ("AccountKey", "SharedAccessSignature")


def endpoint_of(scheme: str) -> str:
    """What tells apart two stores with addresses of this scheme; empty for the store of its cloud.

    Nothing of it is secret. No request is made, and no driver is imported unless a file of botocore
    may name an endpoint.
    """
    if scheme in ("s3", "s3a"):
        told = next(filter(None, map(os.environ.get, _S3_VARIABLES)), None) or _configured()
    elif scheme in ("gs", "gcs"):
        told = os.environ.get("STORAGE_EMULATOR_HOST", "")
    elif scheme in ("az", "abfs", "abfss"):
        told = _azure()
    else:
        told = ""
    return told.rstrip("/").lower()


def _configured() -> str:
    """The endpoint of S3 in the files of botocore; empty if there is none, or they are wrong.

    An error in them ends the first request, with its reason.
    """
    files = (os.environ.get(name) or f"~/.aws/{file}" for name, file in _S3_CONFIGURATION)
    if not any(Path(os.path.expanduser(file)).is_file() for file in files):
        return ""
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session
    except ImportError:
        return ""
    session = Session()
    try:
        profile: dict[str, Any] = session.get_scoped_config()
        services = session.full_config.get("services", {}).get(profile.get("services"), {})
    except BotoCoreError:
        return ""
    own = services.get("s3", {})
    return str(
        (own if isinstance(own, dict) else {}).get("endpoint_url")
        or profile.get("endpoint_url")
        or ""
    )


def _azure() -> str:
    """The account, which an address does not name, and its endpoint."""
    connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = [part for part in connection.split(";") if part.partition("=")[0] not in _AZURE_SECRETS]
    return ";".join(parts) or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
