"""Repositories on the Hugging Face Hub that checkpoints are uploaded to."""

from __future__ import annotations

from huggingface_hub import HfApi


def make_repository(api: HfApi, name: str, private: bool | None) -> str:
    """Creates a repository, unless it exists.

    Args:
        api: the client.
        name: such as `"me/my-model"`, or `"my-model"` for one of the user's own.
        private: whether a new one is private; None for what its owner's settings say. With True, a public one that
            exists is refused.

    Returns:
        Its full name.

    Raises:
        ValueError: it should be private, exists, and is public.
        OSError: the Hub refuses.
    """
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repository).private:  # the Hub leaves one that exists as it is
        raise ValueError(
            f"{repository} exists and is public, so nothing was uploaded: make it private in its settings on the Hub, "
            "or give another name."
        )
    return repository
