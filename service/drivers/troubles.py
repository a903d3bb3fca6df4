"""What goes wrong with an object store, in words: the error of a driver, read. Pure.

No driver is imported: botocore, gcsfs and adlfs are known by the names and codes in their errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple

Verb = Literal["write", "read", "list", "delete"]
_RIGHTS: dict[Verb, str] = {
    "write": "s3:PutObject, storage.objects.create",
    "read": "s3:GetObject, storage.objects.get",
    "list": "s3:ListBucket, storage.objects.list",
    "delete": "s3:DeleteObject, storage.objects.delete",
}
_DRIVERS = {
    "adlfs",
    "aiobotocore",
    "aiohttp",
    "azure",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "requests",
    "s3fs",
    "urllib3",
}
NO_BUCKET = "the bucket does not exist. Create it, or correct the address"
_MISTAKES = {
    "NoSuchBucket": NO_BUCKET,
    "ContainerNotFound": NO_BUCKET,
    "InvalidBucketName": "this is no name that a bucket can have",
    "InvalidAccessKeyId": "the store does not know this access key. Check the credentials, and "
    "whether AWS_ENDPOINT_URL names the store that they are for",
    "SignatureDoesNotMatch": "the secret key does not fit the access key. Check the credentials",
    "AuthenticationFailed": "the credentials are not accepted. Check them",
    "AuthorizationFailure": "the credentials, or the network that this machine is in, are not "
    "accepted. Check both",
    "ExpiredToken": "the session token has expired. Get a new one",
    "InvalidToken": "the session token is not valid. Get a new one",
    "TokenRefreshRequired": "the session token must be renewed",
    "NoCredentialsError": "no credentials were found. Set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
    "PartialCredentialsError": "the credentials are incomplete",
    "DefaultCredentialsError": "no credentials were found. Set GOOGLE_APPLICATION_CREDENTIALS, or "
    "give this machine a service account",
    "RequestTimeTooSkewed": "the clock of this machine differs from that of the store by more than "
    "the store accepts. Set the clock",
    "PermanentRedirect": "the bucket is in another region, or at another endpoint. Set "
    "AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL",
    "AuthorizationHeaderMalformed": "the bucket is in another region. Set AWS_DEFAULT_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region. Set AWS_DEFAULT_REGION",
    "InvalidObjectState": "the object is in an archive, to which a lifecycle rule of the bucket "
    "may have moved it. Restore it, and exclude the runs from this rule",
    "NotImplemented": "the store does not know a request that runs need, such as a write with the "
    "condition that there is no object of this name",
    "301": "the bucket is in another region, or at another endpoint. Set AWS_DEFAULT_REGION, or "
    "AWS_ENDPOINT_URL",
}
_UNREACHED = {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"}
_UNREACHED |= {"ClientConnectorDNSError", "ServiceRequestError"}  # of gcsfs and azure
_STRANGE = {"", "405", "501", "ResponseParserError", "HTTPClientError", "SSLError"}
"""An answer without a code of S3, or none that can be read."""
_ENDPOINTS = "AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST or AZURE_STORAGE_CONNECTION_STRING"
_UNANSWERED = ("FSTimeoutError", "ReadTimeoutError", "ServerTimeoutError", "TimeoutError")
_DENIED = {"AccessDenied", "AllAccessDisabled", "AuthorizationPermissionMismatch", "403"}
_LONGEST = 300  # characters of what a driver says


class Trouble(NamedTuple):
    """What an error of a driver means."""

    told: str
    """What is wrong, and what to do."""
    is_passing: bool
    """Whether the same request may succeed a little later."""


def trouble_of(error: Exception, verb: Verb) -> Trouble:
    """What this error of a request means."""
    chain = list(_chain(error))
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return Trouble(f"{error}. Correct AWS_ENDPOINT_URL", is_passing=False)
    if not any(_is_of_a_driver(each) for each in chain):
        # Of the driver or of what is below it, as all that a request raises: told by its name.
        return Trouble(f"{type(error).__name__}: {error}"[:_LONGEST].rstrip("."), is_passing=True)
    names = [name for each in chain for name in _names_of(each)]
    for name in names:
        if name in _MISTAKES:
            return Trouble(_MISTAKES[name], is_passing=False)
    if not _DENIED.isdisjoint(names) or any(isinstance(each, PermissionError) for each in chain):
        return Trouble(
            f"the credentials give no right to {verb} objects there ({_RIGHTS[verb]})",
            is_passing=False,
        )
    said = next((text for each in chain if (text := str(each))), "") or type(error).__name__
    if not _UNREACHED.isdisjoint(names):
        said = f"it cannot be reached ({said}). Check the network, and {_ENDPOINTS} if it is set"
    elif not set(_UNANSWERED).isdisjoint(names):
        said = f"it did not answer a request to {verb} in time ({said})"
    elif not _STRANGE.isdisjoint(names):
        said = (
            f"what answers is perhaps no object store ({said[:_LONGEST]}). Check {_ENDPOINTS} "
            "if it is set"
        )
        return Trouble(said, is_passing=True)
    return Trouble(said[:_LONGEST].rstrip("."), is_passing=True)


def is_no_bucket(error: Exception) -> bool:
    """Whether the bucket is missing, and not an object in it."""
    names = {name for each in _chain(error) for name in _names_of(each)}
    return not names.isdisjoint({"NoSuchBucket", "ContainerNotFound"})


def is_beyond_end(error: Exception) -> bool:
    """Whether the bytes that were requested begin after the end of the object."""
    names = {name for each in _chain(error) for name in _names_of(each)}
    return not names.isdisjoint({"InvalidRange", "416"})


def deletes(rule: Mapping[str, Any], prefix: str) -> bool:
    """Whether a lifecycle rule of S3 deletes objects below a prefix, which have no tags."""
    chosen = rule.get("Filter", {})
    chosen = chosen.get("And", chosen)
    if rule.get("Status") != "Enabled" or chosen.keys() & {"Tag", "Tags"}:
        return False
    told = str(chosen.get("Prefix", rule.get("Prefix", "")))
    expires = rule.get("Expiration", {}).keys() & {"Days", "Date"}
    return bool(expires) and (prefix.startswith(told) or told.startswith(prefix))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_a_driver(error: BaseException) -> bool:
    home = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or home in _DRIVERS


def _names_of(error: BaseException) -> Iterator[str]:
    """The kind of an error, and the codes in it."""
    yield type(error).__name__
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        yield str(response.get("Error", {}).get("Code", ""))
    for name in ("code", "error_code", "status", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, Enum):  # azure's codes, whose `str` is the name of the member
            value = value.value
        if isinstance(value, int | str):
            yield str(value)
