"""csvctl check: find and mend damage."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
) -> None:
    """Check the volume on LUN."""
    raise NotImplementedError
