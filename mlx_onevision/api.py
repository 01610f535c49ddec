"""Opening a model, as a library: :func:`load` returns a :class:`~mlx_onevision.model.Model`."""

from collections.abc import Callable
from pathlib import Path

from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.recipes import while_loading
from mlx_onevision.model import Model
from mlx_onevision.network.stages import Split


def load(
    model: str | Path = "demo",
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    memory_limit: float | None = None,
    kv_bits: int | None = None,
    visual_tokens: float | None = None,
    chat_template: str | None = None,
    draft_model: str | Path | None = None,
    sharded: bool = False,
    split: Split | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Model:
    """Opens a LLaVA-OneVision checkpoint. Weights are mapped, and read when they are first used.

    model : a folder, a Hub id, a size (``0.5b``, ``7b``, ``72b``), or ``demo``: the small model
        that comes with this package and knows coloured shapes.
    revision : branch, tag or commit, for a model of the Hub.
    dtype : ``float16``, ``bfloat16`` or ``float32``; None keeps the checkpoint's own.
    quantize : 4 or 8 quantizes the weights to so many bits while they are read, tensor by tensor,
        as ``mlx-onevision convert -q --q-bits 4`` does; the answers are those of what that writes.
    memory_limit : GB (1e9 bytes) of memory to use at most, weights included. Requests that cannot
        stay within it are refused, others are computed in smaller steps where they must. None: what
        the device should use; models of one process divide what their weights leave free of it.
    kv_bits : 8 or 4 keeps keys and values quantized, which takes about a half or a quarter of the
        memory a token. Answers may differ; requests run one after another instead of in a batch.
    visual_tokens : the share to keep of the tokens of an image's tiles and of video frames, above 0
        and at most 1 (None: 1); a request may say otherwise. Fewer are faster and see less detail.
    chat_template : how conversations become prompts, in Jinja, instead of the checkpoint's own.
    draft_model : a smaller LLaVA-OneVision checkpoint with the same tokenizer, which proposes
        tokens to requests with ``draft_tokens``. Its weights are never quantized while they are
        read, and count towards the memory limit.
    sharded : where ``mlx.launch`` has started this process, its ranks hold a share each of the
        language model. Rank 0 is asked. On the others this does not return: they compute what rank
        0 does, and end with SystemExit when it closes the model. Without draft tokens and prompt
        caches. Where a rank is lost, every request fails, and a few seconds later the process ends.
    split : they divide the layers instead, as machines of different memory do: ``"auto"``, so that
        each one's memory is as full as the others', or a share for each rank, as ``(30, 50)``. Then
        rank 0 has the logits.
    adapter : a folder or a Hub id: what fine-tuning with mlx-onevision, mlx-lm or PEFT has changed.
    progress : called on the model's thread with the bytes that have been quantized, and all that
        will be, where ``quantize`` is given.

    Raises:
        ModelNotFoundError: for a model or an adapter that does not exist or cannot be reached.
        CheckpointError: for a folder in which something is missing, damaged or not supported, and
            an adapter that does not fit; ConfigError for another kind of model.
        OutOfMemoryError: where the model does not fit into the memory limit.
        RequestError: for an argument that cannot be, and a draft model with another vocabulary or
            other tiles.
    """
    recipe = while_loading(quantize)
    folder = hub.resolve(model, revision)
    return Model(
        folder,
        name=str(model),
        dtype=dtype,
        recipe=recipe,
        memory_limit=memory_limit,
        kv_bits=kv_bits,
        visual_tokens=visual_tokens,
        chat_template=chat_template,
        draft=None if draft_model is None else hub.resolve(draft_model),
        sharded=sharded,
        split=split,
        adapter=None if adapter is None else hub.resolve_adapter(adapter),
        progress=progress,
    )
