"""The KV cache of a conversation, kept in a file and gone on from in another process."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Sizes, write
from PIL import Image

from mlx_onevision.api import Model, load
from mlx_onevision.engine.kv_cache import first_positions
from mlx_onevision.errors import OutOfMemoryError, RequestError
from mlx_onevision.network.memory_sizes import SMALLEST, RequestSize

ASK = """
import json, sys
from mlx_onevision.api import load
folder, file, image, messages = sys.argv[1:]
model = load(folder)
print(model.load_prompt_cache(file)[0])
found = model.generate(messages=json.loads(messages), images=[image], max_tokens=12)
print(json.dumps([found.tokens, found.usage.cached_tokens, found.usage.encoded_media]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), sizes=Sizes(hidden=128), tied=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    loaded = load(folder)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def asked(text: str = "what is there to be seen? " * 3) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def ask(model: Model, image: Path, messages: list[dict[str, Any]]) -> Any:
    return model.generate(messages=messages, images=[str(image)], max_tokens=12)


def test_another_process_goes_on(model: Model, folder: Path, image: Path, tmp_path: Path) -> None:
    messages, file = asked(), tmp_path / "kept"
    first = ask(model, image, messages)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "why"}]
    file.write_text("older")
    model.save_prompt_cache(file)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert file.stat().st_mode & 0o777 == 0o600
    expected = ask(load(folder), image, messages)
    command = [sys.executable, "-c", ASK, *map(str, (folder, file, image)), json.dumps(messages)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, found = map(json.loads, done.stdout.splitlines())
    tokens, cached, encoded = found
    assert tuple(tokens) == expected.tokens
    # The text of a random answer is other tokens when it is read again.
    assert first.usage.prompt_tokens - 2 <= cached <= held
    assert encoded == 0 and expected.usage.encoded_media == 1


def test_media_have_other_ids_there(folder: Path, image: Path, tmp_path: Path) -> None:
    """Two images, whose ranges of virtual ids belong to others in the model that reads them."""
    pixels = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    question = "what is there to be seen? " * 3
    model, other = load(folder), load(folder)
    model.generate(question, images=[pixels[0], pixels[1]], max_tokens=4)
    model.save_prompt_cache(tmp_path / "kept")
    for number in (2, 3, 1, 0):
        other.generate("hello", images=[pixels[number]], tiling="never", max_tokens=2)
    other.load_prompt_cache(tmp_path / "kept")
    for pair in ((0, 1), (1, 0)):
        images = [pixels[number] for number in pair]
        expected = load(folder).generate(question, images=images, max_tokens=20)
        found = other.generate(question, images=images, max_tokens=20)
        assert found.tokens == expected.tokens
        assert found.usage.cached_tokens == (found.usage.prompt_tokens - 1 if pair[0] == 0 else 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache(folder: Path, image: Path, tmp_path: Path, bits: int) -> None:
    model, other = load(folder, kv_bits=bits), load(folder, kv_bits=bits)
    expected = ask(model, image, asked())
    model.save_prompt_cache(tmp_path / "kept", {"note": "ä"})
    tokens, metadata = other.load_prompt_cache(tmp_path / "kept")
    found = ask(other, image, asked())
    assert metadata == {"note": "ä"} and tokens >= expected.usage.prompt_tokens
    assert found.tokens == expected.tokens
    assert found.usage.cached_tokens == expected.usage.prompt_tokens - 1
    with pytest.raises(RequestError, match=f"written with kv_bits {bits}, .* with kv_bits None"):
        load(folder).load_prompt_cache(tmp_path / "kept")


def test_mlx_lm_reads_it(model: Model, image: Path, tmp_path: Path) -> None:
    from mlx_lm.models.cache import load_prompt_cache

    answer = ask(model, image, asked())
    file = tmp_path / "kept.safetensors"
    model.save_prompt_cache(file)
    layers, metadata = load_prompt_cache(str(file), return_metadata=True)
    held = len(json.loads(metadata["ids"]))
    assert {layer.offset for layer in layers} == {held}
    assert held >= answer.usage.prompt_tokens


def test_what_does_not_suit_is_refused(
    model: Model, folder: Path, image: Path, tmp_path: Path
) -> None:
    file = tmp_path / "kept"
    ask(model, image, asked())
    model.save_prompt_cache(file)
    whole = file.read_bytes()
    other = load(write(tmp_path / "other", sizes=Sizes(hidden=128), tied=False, seed=1))
    with pytest.raises(RequestError, match=r"kept belongs to another model, .*, and not to other;"):
        other.load_prompt_cache(file)
    with pytest.raises(RequestError, match=r"was written with dtype None, .* with dtype float16"):
        load(folder, dtype="float16").load_prompt_cache(file)
    arrays, header = arrays_and_header(file)  # of a model with a longer context
    media = json.dumps([["a", 0, 10_000_000]])
    mx.save_safetensors(str(tmp_path / "long.safetensors"), arrays, {**header, "0.media": media})
    with pytest.raises(RequestError, match=r"long\.safetensors belongs to another model"):
        other.load_prompt_cache(tmp_path / "long.safetensors")
    with pytest.raises(RequestError, match="has more media than a prompt can have"):
        model.load_prompt_cache(tmp_path / "long.safetensors")
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", whole + b"x"):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(RequestError, match="cut is no prompt cache, or is cut off or damaged"):
            model.load_prompt_cache(tmp_path / "cut")
    with pytest.raises(RequestError, match=r"model\.safetensors is no prompt cache"):
        model.load_prompt_cache(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        model.load_prompt_cache(tmp_path / "none")
    model.generate("one two three " * 80, max_tokens=1)
    model.save_prompt_cache(file)
    least = model._engine.memory.request(RequestSize(128, 128), SMALLEST).total
    small = load(folder, memory_limit=1.01 * least / 1e9)
    with pytest.raises(OutOfMemoryError):
        small.load_prompt_cache(file)


def arrays_and_header(path: Path) -> Any:
    return mx.load(str(path), format="safetensors", return_metadata=True)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("ids", lambda ids: [[1], *ids[1:]]),
        ("ids", lambda ids: [1.5, *ids[1:]]),
        ("ids", lambda ids: {str(token): 1 for token in ids}),
        ("ids", lambda ids: []),
        ("ids", lambda ids: 7),
        ("media", lambda media: 7),
        ("media", lambda media: {"a": 1}),
        ("media", lambda media: [*media, None]),
        ("media", lambda media: [media[0][:2]]),
        ("media", lambda media: [[1, *media[0][1:]]]),
        ("media", lambda media: [[*media[0][:2], "2"]]),
        ("media", lambda media: [[*media[0][:2], True]]),
        ("media", lambda media: [[*media[0][:2], -1]]),
        ("media", lambda media: [[*media[0][:2], 1 << 40]]),
        ("media", lambda media: [["other", 0, 30_000], ["another", 30_000, 30_000]]),
        ("media", lambda media: [[*media[0][:2], media[0][2] - 1]]),  # known with another length
        ("", "text"),
        ("30000000.0", "KVCache"),
    ],
)
def test_edited_headers_are_refused(
    model: Model, image: Path, tmp_path: Path, entry: str, value: Any
) -> None:
    answer = ask(model, image, asked())
    model.save_prompt_cache(tmp_path / "kept")
    arrays, header = arrays_and_header(tmp_path / "kept")
    if entry in ("ids", "media"):
        header[f"0.{entry}"] = json.dumps(value(json.loads(header[f"0.{entry}"])))
    else:
        header = {name: text for name, text in header.items() if not name.startswith("0.")}
        header["0" if not entry else entry] = value
    mx.save_safetensors(str(tmp_path / "edited.safetensors"), arrays, header)
    with pytest.raises(RequestError, match=r"edited\.safetensors "):
        model.load_prompt_cache(tmp_path / "edited.safetensors")
    assert ask(model, image, asked()).tokens == answer.tokens


def test_names_of_arrays_do_not_say_how_much_memory_is_taken(
    model: Model, image: Path, tmp_path: Path
) -> None:
    ask(model, image, asked())
    model.save_prompt_cache(tmp_path / "kept", {"a.b": "c"})
    arrays, header = arrays_and_header(tmp_path / "kept")
    arrays["30000000.0"] = arrays.pop("1.0")
    mx.save_safetensors(str(tmp_path / "edited.safetensors"), arrays, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match="of other shapes"):
        model.load_prompt_cache(tmp_path / "edited.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert model.load_prompt_cache(tmp_path / "kept")[1] == {"a.b": "c"}


def test_one_that_was_cancelled_before_its_media_were_read_is_kept(
    model: Model, image: Path, tmp_path: Path
) -> None:
    """It holds fewer ids than its medium has."""
    held = ask(model, image, asked()).usage

    def shorten(runner: Any) -> int:
        kept = runner.prefix._kept[-1]
        first = next(place for place, token in enumerate(kept.ids) if token >= 384)
        cut = [*first_positions(kept.cache, first + 2)]
        mx.eval([layer.state[:2] for layer in cut])
        runner.prefix.store(kept.ids, kept.keys, cut)
        return first + 2

    short = model._engine._worker.call(shorten)
    assert short < held.media_tokens
    model.save_prompt_cache(tmp_path / "kept")
    assert model.load_prompt_cache(tmp_path / "kept")[0] == short


def test_nothing_was_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no conversation to write"):
        load(folder).save_prompt_cache(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_where_the_new_one_cannot_be_written(
    model: Model, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(model, image, asked())
    model.save_prompt_cache(tmp_path / "kept")
    whole = (tmp_path / "kept").read_bytes()

    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        model.save_prompt_cache(tmp_path / "kept")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("kept", whole)]
