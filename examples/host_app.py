"""A host application in 40 lines: asks a backend, shows what happens, and can be stopped.

python examples/host_app.py [PICTURE [QUESTION [BACKEND]]]

BACKEND is "engine", or "fake", which needs no weights. Ctrl-C ends the request.
"""

import sys
from pathlib import Path

from mlx_onevision.plugins import interface, open_backend


def main(
    picture: str = str(Path(__file__).with_name("shapes.png")),
    question: str = "What is in the image?",
    name: str = "engine",
) -> None:
    with open_backend(name) as backend:
        media = interface.Media("image", data=Path(picture).read_bytes())
        request = interface.GenerateRequest.ask(question, media, timeout=60)
        with backend.generate(request) as events:  # leaving it early cancels the request
            for event in events:
                if isinstance(event, interface.ProgressEvent):
                    print(f"[{event.stage}]", file=sys.stderr)
                elif isinstance(event, interface.TextEvent):
                    print(event.delta, end="", flush=True)
                elif isinstance(event, interface.ErrorEvent):
                    sys.exit(f"{event.code}: {event.error}")
    print()


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
