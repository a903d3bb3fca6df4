"""Which environment variables hold secrets, by their names. Pure."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"KEY|TOKEN(?!IZE)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_(PASS|PWD|PAT)$|AUTH(?!OR(?!I))",
    re.IGNORECASE,  # but not GIT_AUTHOR_NAME and TOKENIZER
)
# The path of a secret is not a secret, and a spec may contain it.
_NAMES_A_PLACE = re.compile(
    r"_(FILE|PATH|DIR|SOCK)$|^GOOGLE_APPLICATION_CREDENTIALS$|^XAUTHORITY$", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name contains a secret: WANDB_API_KEY does, SSH_AUTH_SOCK not."""
    return bool(_SECRET.search(name)) and not _NAMES_A_PLACE.search(name)
