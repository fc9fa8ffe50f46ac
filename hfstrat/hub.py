"""Publishing on the Hugging Face Hub. The result is on disk first; a failed upload never fails the run."""

from __future__ import annotations

from pathlib import Path

from hfstrat.config import Recipe
from hfstrat.errors import UserError


def check_access(recipe: Recipe) -> None:
    """Find out before training whether the repository can be written to; it is made when there is something to upload.

    Raises:
        UserError: no login, no permission, or no connection.
    """
    if not recipe.hub.push or recipe.hub.repo is None:
        return
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.whoami()
        if api.repo_exists(recipe.hub.repo):
            api.auth_check(recipe.hub.repo, write=True)
    except Exception as error:  # the transport has many ways to fail
        raise UserError(
            f"hub.repo: {recipe.hub.repo} cannot be written to ({str(error).splitlines()[0]}); run `hf auth login`, check the "
            "name, or set hub.push: false"
        ) from error


def push(recipe: Recipe, folder: Path) -> list[str]:
    """Upload the verified result; returns what to tell the user."""
    if not recipe.hub.push or recipe.hub.repo is None:
        return []
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(recipe.hub.repo, private=recipe.hub.private, exist_ok=True)
        url = api.upload_folder(repo_id=recipe.hub.repo, folder_path=folder, commit_message="hfstrat: trained and verified")
        return [f"pushed           {url}"]
    except Exception as error:  # whatever it is, the result is safe on disk
        return [f"not pushed       {str(error).splitlines()[0]}; the result is complete in {folder}"]
