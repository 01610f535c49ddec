"""Embeddings: vectors, and their provenance, without which two of them cannot be compared.

numpy only, so that saved ones can be read where there is no MLX.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import RequestError
from mlx_onevision.files import replacing

Space = Literal["vision", "joint"]
SPACES: tuple[Space, ...] = ("vision", "joint")

NOTES: dict[Space, str] = {
    "vision": (
        "Images and videos only: the tower of LLaVA-OneVision was trained away from SigLIP's "
        "contrastive space, so these cannot be compared with any text. For duplicates and for "
        "images that look alike; valid within one checkpoint."
    ),
    "joint": (
        "Experimental: hidden states of a model that was not trained for retrieval, under the "
        "prompts of E5-V. Text, images and videos share the space; valid within one checkpoint."
    ),
}

SHOWN = 20  # names, in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Embeddings:
    """Vectors of one space, and where they come from.

    Those of another space, model, quantization or method cannot be joined or compared.

    vectors : float32 (n, dim), a row for each item.
    space : ``vision`` or ``joint``; see :attr:`note`.
    model : the repository's id or the folder's name.
    revision : the repository's commit, or a hash of the folder's weights.
    quantization : how the checkpoint's weights are quantized, in words; None where they are not.
    method : what was pooled, in words.
    normalized : whether every vector has length 1.
    names : what each vector is of: a path, a URL, a text, or "item 3".
    """

    vectors: NDArray[np.float32]
    space: Space
    model: str
    revision: str
    quantization: str | None
    method: str
    normalized: bool
    names: tuple[str, ...]

    def __repr__(self) -> str:
        of = ", ".join(map(repr, self.names[:3])) + (", …" if len(self) > 3 else "")
        return (
            f"<Embeddings: {len(self):,} of {self.dim:,} values, {self.space} space of "
            f"{self.model} at {self.revision[:12]}; {of}>"
        )

    def _repr_html_(self) -> str:
        """For a notebook: whose vectors they are, and the space's note."""
        rows = "".join(
            f"<tr><td>{number}</td><td>{escape(name)}</td></tr>"
            for number, name in enumerate(self.names[:SHOWN])
        )
        more = f"<br>… and {len(self) - SHOWN:,} more" if len(self) > SHOWN else ""
        return (
            f"<table>{rows}</table><small>{len(self):,} vectors of {self.dim:,} values, "
            f"{self.space} space of {escape(self.model)}{more}<br>{self.note}</small>"
        )

    @property
    def dim(self) -> int:
        """The number of values of a vector."""
        return self.vectors.shape[1]

    @property
    def experimental(self) -> bool:
        """Whether the model was not trained for this space."""
        return self.space == "joint"

    @property
    def note(self) -> str:
        """What the space is good for, and what not, in a sentence or two."""
        return NOTES[self.space]

    @property
    def provenance(self) -> dict[str, Any]:
        """All fields that belong to every vector, as plain values."""
        kept = ("space", "dim", "normalized", "model", "revision", "quantization", "method")
        return {name: getattr(self, name) for name in kept}

    def __len__(self) -> int:
        return len(self.vectors)

    def similarity(self, other: "Embeddings") -> NDArray[np.float32]:
        """The cosines of these vectors with those of ``other``, float32 (len(self), len(other)).

        Raises:
            RequestError: where the two are not of one space, model and method.
        """
        self.require_comparable(other)
        return _unit(self.vectors) @ _unit(other.vectors).T

    def require_comparable(self, other: "Embeddings") -> None:
        """Checks that these vectors can be compared with those of ``other``.

        Raises:
            RequestError: where the two are not of one space, model and method.
        """
        for name, hint in _MUST_AGREE.items():
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                if name == "revision":
                    one, two = (f"{e.model} at {e.revision[:12]}" for e in (self, other))
                raise RequestError(
                    f"these embeddings have different {name} ({one} and {two}) and cannot be "
                    f"compared; {hint}"
                )

    @staticmethod
    def concatenate(parts: Sequence["Embeddings"]) -> "Embeddings":
        """All vectors of ``parts``, in order.

        Raises:
            RequestError: where they are not of one space, model and method, or there are none.
        """
        if not parts:
            raise RequestError("there are no embeddings to concatenate")
        first = parts[0]
        for part in parts[1:]:
            first.require_comparable(part)
            if part.normalized != first.normalized:
                raise RequestError("some of these embeddings are normalized and some are not")
        values = {field.name: getattr(first, field.name) for field in fields(first)}
        values["vectors"] = np.concatenate([part.vectors for part in parts])
        values["names"] = tuple(name for part in parts for name in part.names)
        return Embeddings(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.provenance | {"names": list(self.names), "vectors": self.vectors.tolist()}

    def save(self, path: str | os.PathLike[str], *, private: bool = False) -> None:
        """Writes an npz file: ``vectors``, ``names`` and ``provenance`` (JSON text).

        path : the file; one that is there is replaced.
        private : only its owner may read it.

        Raises:
            OSError: where it cannot be written; an older file is still whole then.
        """
        with replacing(Path(path), private) as file:
            np.savez(
                file,
                vectors=self.vectors,
                names=np.array(self.names, np.str_),
                provenance=np.array(json.dumps(self.provenance)),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Embeddings":
        """The embeddings in a file, ``path``, that :meth:`save` wrote.

        Raises:
            RequestError: for a file of another kind.
            OSError: where it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as kept:
                vectors = np.ascontiguousarray(kept["vectors"], np.float32)
                names = tuple(map(str, kept["names"]))
                provenance = json.loads(str(kept["provenance"]))
            fits = vectors.shape == (len(names), provenance.pop("dim"))
            loaded = cls(vectors=vectors, names=names, **provenance)
        except OSError:
            raise
        except Exception as error:  # a zip, a pickle, another program's arrays: whatever it is
            raise RequestError(f"{os.fspath(path)} does not hold embeddings") from error
        if not fits or loaded.space not in SPACES:
            raise RequestError(f"{os.fspath(path)} does not hold embeddings")
        return loaded


# What must agree, the most specific reason first, and what to do instead.
_MUST_AGREE = {
    "space": "embed both in one space",
    "revision": "embed both with one model",
    "quantization": "embed both with one model",
    "method": "embed both in the same way",
    "dim": "embed both with one model",
}


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
