"""What the environment asks of the kernels."""

from __future__ import annotations

from padst_kernels.cpu import isa

from padst_cli.errors import PadstError


def check_environment() -> None:
    """Refuse what a kernel would stumble over later; raises `PadstError`."""
    try:
        isa.allowed()
    except ValueError as error:
        raise PadstError(str(error)) from None
