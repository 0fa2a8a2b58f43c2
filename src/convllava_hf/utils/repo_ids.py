"""Names of repositories on the Hub."""

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_repo_id(name: str, needs_owner: bool = True) -> bool:
    """Whether a text has the form of an id on the Hub; whether there is such a repository is not asked.

    Args:
        needs_owner: whether it must be owner/name; else a mere name, such as `gpt2`, is an id as well.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # The pattern of huggingface_hub also takes letters of all alphabets, and a line break at the end.
    return name.isascii() and not name.endswith("\n") and ("/" in name or not needs_owner)
