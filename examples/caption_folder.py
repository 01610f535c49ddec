"""Describes every picture of a folder: one JSON object a line, on stdout.

python examples/caption_folder.py FOLDER [MODEL] > captions.jsonl
"""

import json
import sys
from pathlib import Path

from mlx_onevision import OneVisionError, load


def main(folder: str, model: str = "demo") -> None:
    loaded = load(model)
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file():
            continue
        try:
            answer = loaded.generate("Describe this image.", images=[path], max_tokens=128)
        except OneVisionError as error:  # not a picture, or a broken one: the next may be fine
            print(error, file=sys.stderr)
        else:
            print(json.dumps({"file": path.name, "text": answer.text}), flush=True)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
