"""csvctl format: make a volume of a LUN."""

from __future__ import annotations

from typing import Annotated

import typer


def format_lun(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
    label: Annotated[str, typer.Option(metavar="NAME", help="The volume's name.")],
) -> None:
    """Make an empty csvfs volume of LUN. What was on it is lost."""
    raise NotImplementedError
