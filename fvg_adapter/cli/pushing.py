"""`fvg-adapter push`: a saved adapter goes to the Hub as it lies in its folder, with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fvg_adapter.cli.console import AsJson, Debug, mistakes_told, show, show_json


@mistakes_told
def push_adapter(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to: NAME/ADAPTER on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    branch: Annotated[str | None, typer.Option(help="A branch, made if need be.", show_default="the main one")] = None,
    message: Annotated[str, typer.Option(help="First line of the commit.")] = "Upload with fvg_adapter",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the card: apache-2.0, mit, …", show_default="none chosen")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="For the card: name or Hub id of the data.", show_default="as trained")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A card of yours, in place of what is there or generated.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Upload a saved adapter to the Hub, in one commit, with its model card.

    Only our own files are uploaded, and no path of this machine. A README.md
    that you edited goes along; a card that was edited on the Hub is kept. The
    base model is not loaded. The card shows attention.png, pictures of the test
    set: delete that file first if nobody may see them.

    Examples:

    \b
    hf auth login
    fvg-adapter push out/adapter me/pets-fvg --license mit
    fvg-adapter push out/adapter me/pets-fvg --private --branch warm
    """
    from fvg_adapter.hub import push_folder, update_card

    if licence is not None or dataset is not None:
        update_card(adapter, license=licence, dataset=dataset)
    options: dict[str, Any] = {"private": private or None, "branch": branch, "commit_message": message}
    url = push_folder(adapter, repo_id, create_pr=create_pr, card=card, **options)
    if as_json:
        show_json({"repo_id": repo_id, "commit": url})
    else:
        show(f"pushed: {url}")
        show(f'  load("{repo_id}"' + (f', revision="{branch}")' if branch else ")"))
