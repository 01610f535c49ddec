"""Finds the pictures of a folder that look most like one picture.

    pip install apsw sqlite-vec
    python examples/similar_pictures.py FOLDER PICTURE [MODEL]

The vectors are kept in FOLDER/vectors.db, a SQLite database with the extension sqlite-vec, so that
the next search embeds new pictures only. apsw, because Python's own sqlite3 is often built without
extensions, on Macs above all.
"""

import json
import sys
from pathlib import Path

import apsw
import sqlite_vec

from mlx_onevision import Embeddings, Model, OneVisionError, load


def open_index(path: Path, like: Embeddings) -> apsw.Connection:
    """The database, whose vectors have to come from where ``like`` comes from."""
    index = apsw.Connection(str(path))
    index.enable_load_extension(True)
    index.load_extension(sqlite_vec.loadable_path())
    index.execute("create table if not exists made_by (provenance text)")
    made_by = json.dumps(like.provenance)
    kept = index.execute("select provenance from made_by").get
    if kept is None:
        index.execute("insert into made_by values (?)", (made_by,))
        index.execute(
            "create virtual table pictures using vec0"
            f"(file text primary key, vector float[{like.dim}] distance_metric=cosine)"
        )
    elif kept != made_by:
        sys.exit(f"{path} has another model's vectors; delete it to begin anew.")
    return index


def add_new(index: apsw.Connection, folder: Path, model: Model) -> None:
    """Embeds the files that the database does not know; a file that is no picture is reported."""
    known = {file for (file,) in index.execute("select file from pictures")}
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    new = [path for path in files if str(path) not in known and path.suffix != ".db"]

    def report(_: int, error: OneVisionError) -> None:
        print(error, file=sys.stderr)

    embeddings = model.embed(new, on_error=report)
    rows = zip(embeddings.names, map(bytes, embeddings.vectors), strict=True)
    with index:
        index.executemany("insert into pictures values (?, ?)", rows)


def main(folder: str, picture: str, name: str = "demo") -> None:
    model = load(name)
    wanted = model.embed([picture])
    index = open_index(Path(folder) / "vectors.db", wanted)
    add_new(index, Path(folder), model)
    nearest = index.execute(
        "select file, distance from pictures where vector match ? and k = 5 order by distance",
        (bytes(wanted.vectors[0]),),
    )
    for file, distance in nearest:
        print(f"{1 - distance:.3f}  {file}")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
