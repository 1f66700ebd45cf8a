"""csvctl dump: show structures."""

from __future__ import annotations

from typing import Annotated

import typer


def dump(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
) -> None:
    """Show on-disk structures of the volume on LUN."""
    raise NotImplementedError
