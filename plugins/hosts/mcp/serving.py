"""The server's life: from the first line to the end of stdin, SIGTERM or Ctrl-C."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mlx_onevision.plugins.hosts.mcp.pipes import Pipes
from mlx_onevision.plugins.hosts.mcp.server import make_server
from mlx_onevision.plugins.hosts.mcp.settings import McpSettings
from mlx_onevision.plugins.hosts.mcp.transport import transport
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

GRACE_SECONDS = 1.5  # from the end of stdin to the end of the process
JOBS_SECONDS = 24 * 3600.0  # that a description can be asked for; its host may come back late

INTERRUPTED = 130

logger = logging.getLogger("mlx_onevision")


def serve(backend: Backend, pipes: Pipes, settings: McpSettings | None = None) -> NoReturn:
    """Answers what comes, and ends the process when nobody is there any more.

    The process, because a model that computes and a library's threads would hold a mere return up.
    """
    code = asyncio.run(_life(backend, pipes, settings or McpSettings()))
    os._exit(code)


async def _life(backend: Backend, pipes: Pipes, settings: McpSettings) -> int:
    code = 0
    jobs = Jobs(backend, kept=JOBS_SECONDS)
    server = make_server(backend, jobs, settings)
    with _told_to_end() as told:
        async with transport(pipes, settings) as (incoming, outgoing):
            options = server.create_initialization_options()
            running = asyncio.create_task(server.run(incoming, outgoing, options))
            waiting = asyncio.create_task(told.wait())
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            code = told.code
            _end_soon(code)
            running.cancel()
            waiting.cancel()
            for outcome in await asyncio.gather(running, waiting, return_exceptions=True):
                if isinstance(outcome, Exception):
                    logger.error("the server has ended", exc_info=outcome)
            # Cancels what is under way, and ends the processes that decode videos.
            await asyncio.to_thread(_close, jobs, backend)
    return code


def _close(jobs: Jobs, backend: Backend) -> None:
    jobs.close()
    backend.close()


def _end_soon(code: int) -> None:
    """Ends the process after a while, whatever it does then."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


class _Told(asyncio.Event):
    """Set by a signal; ``code`` is what the process then ends with."""

    code = 0


@contextmanager
def _told_to_end() -> Iterator[_Told]:
    told = _Told()
    loop = asyncio.get_running_loop()

    def end(code: int) -> None:
        told.code = code
        told.set()

    loop.add_signal_handler(signal.SIGTERM, end, 0)
    loop.add_signal_handler(signal.SIGINT, end, INTERRUPTED)
    try:
        yield told
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
