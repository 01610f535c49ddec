"""What a person at the ``llm`` command sees of an error: one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
import llm

from mlx_onevision.plugins.contract.errors import PluginError


class Refusal(llm.ModelError, click.ClickException):
    """Programs catch it as ``llm.ModelError``. Some of llm's commands (``embed``, ``chat``) catch
    nothing; there click writes it, in place of a traceback.
    """


@contextmanager
def told() -> Iterator[None]:
    """Raises Refusal for what the plugin contract refuses."""
    try:
        yield
    except PluginError as error:
        raise Refusal(str(error)) from error
