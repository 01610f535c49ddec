"""Checkpoints that try to run code: none of them does, whatever they are refused with or not.

An audit hook sees what this process executes, imports, unpickles and starts; a file that each of
them tries to make sees what other processes do.
"""

import base64
import io
import json
import os
import pickle
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_checkpoints import edit
from checkpoints import write

import mlx_onevision
from mlx_onevision.api import Model, load
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.errors import OneVisionError

Spoil = Callable[[Path, Path], Any]  # a folder, and the file that must not be made

# Ways out of a template, each with its own road to a function that runs a command.
ROADS = [
    "''.__class__.__mro__[1].__subclasses__()[N]('touch M', shell=True)",
    "cycler.__init__.__globals__.os.popen('touch M').read()",
    "lipsum.__globals__['os'].system('touch M')",
    "self.__init__.__globals__.__builtins__.__import__('os').system('touch M')",
    "joiner.__init__.__globals__.os.system('touch M')",
    "namespace.__init__.__globals__['os'].system('touch M')",
    "raise_exception.__globals__['__builtins__']['exec']('open(\"M\", \"w\")')",
    "(''|attr('__class__')|attr('__mro__'))[1]",
    "messages.__reduce_ex__(2)[0].__globals__",
    "'{0.__class__.__mro__}'.format('')",
    "('%.0s' % ''.__class__)",  # an empty prompt, where it gets through
    "request.application.__globals__.__builtins__.open('M', 'w')",
    "strftime_now.__globals__['os'].system('touch M')",
    "range.__self__.open('M', 'w')",
    "dict.__base__.__subclasses__()",
    "(messages|map(attribute='__class__')|list)[0].__init__.__globals__",
]


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.marker!r}, 'w').close()",)


def source(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n"


def template(road: str, name: str) -> Spoil:
    def spoil(folder: Path, marker: Path) -> None:
        text = "{{ " + road.replace("M", str(marker)).replace("[N]", "[100]") + " }}"
        if name.endswith(".jinja"):
            (folder / name).write_text(text)
        else:
            path = folder / name
            values = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps({**values, "chat_template": text}))
            (folder / "chat_template.jinja").unlink(missing_ok=True)

    return spoil


def setting(file: str, **values: Any) -> Spoil:
    """Fields of a JSON file that other programs run code for, and the code beside it."""

    def spoil(folder: Path, marker: Path) -> None:
        for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py"):
            (folder / name).write_text(source(marker))
        text = json.dumps(values).replace("MARKER", str(marker))
        if not (folder / file).is_file():
            (folder / file).write_text("{}")
        edit(folder, file, **json.loads(text))

    return spoil


def pickled(name: str, protocol: int) -> Spoil:
    def spoil(folder: Path, marker: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(marker), protocol))

    return spoil


def archive(name: str, index: bool = False) -> Spoil:
    """As torch writes it."""

    def spoil(folder: Path, marker: Path) -> None:
        (folder / "model.safetensors").unlink()
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Payload(marker), 2))
            file.writestr("archive/version", "3\n")
        if index:
            weights = {"weight_map": {"image_newline": name}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(weights))

    return spoil


def in_place_of(name: str) -> Spoil:
    def spoil(folder: Path, marker: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Payload(marker), 4))

    return spoil


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CODE = "__import__('os').system('touch MARKER')"
CHECKPOINTS: dict[str, Spoil] = {
    **{f"template {road}": template(road, "chat_template.jinja") for road in ROADS},
    **{f"tokenizer_config {road}": template(road, "tokenizer_config.json") for road in ROADS[:8]},
    **{f"chat_template.json {road}": template(road, "chat_template.json") for road in ROADS[:4]},
    "model_file": setting("config.json", model_file="evil.py"),
    "model_file, trusted": setting("config.json", model_file="evil.py", trust_remote_code=True),
    "auto_map": setting("config.json", auto_map={"AutoModel": "modeling_evil.Evil"}),
    "auto_map of a configuration": setting("config.json", auto_map={"AutoConfig": "evil.Evil"}),
    "auto_map of a tokenizer": setting(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]}
    ),
    "auto_map of a processor": setting(
        "preprocessor_config.json", auto_map={"AutoProcessor": "evil.Evil"}
    ),
    "auto_map of both": setting("processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}),
    "auto_map elsewhere": setting("config.json", auto_map={"AutoModel": "org/name--evil.Evil"}),
    "custom pipelines": setting(
        "config.json", custom_pipelines={"x": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
    ),
    "architectures": setting("config.json", architectures=["evil.Evil"]),
    "tokenizer_class": setting("tokenizer_config.json", tokenizer_class="evil.Evil"),
    "processor_class": setting("processor_config.json", processor_class="evil.Evil"),
    "image_processor_type": setting("preprocessor_config.json", image_processor_type="evil.Evil"),
    "model_type": setting("config.json", model_type="../evil"),
    "activation": setting("config.json", projector_hidden_act=CODE),
    "dtype": setting("config.json", dtype=CODE, torch_dtype=CODE),
    "quantization": setting("config.json", quantization={"bits": CODE, "group_size": 64}),
    "quant_method": setting("config.json", quantization_config={"quant_method": "evil.Evil"}),
    "a target": setting("config.json", _target_="os.system", _args_=["touch MARKER"]),
    "generation": setting("generation_config.json", custom_generate="evil.py", cache="evil.Evil"),
    "a generate of its own": setting("config.json", custom_generate=CODE),
    **{f"pickle {n} renamed": pickled("model.safetensors", n) for n in (0, 2, 3, 4, 5)},
    "pickle": pickled("pytorch_model.bin", 2),
    "pickle .pt": pickled("model.pt", 4),
    "archive renamed": archive("model.safetensors"),
    "archive": archive("pytorch_model.bin"),
    "archive in the index": archive("pytorch_model.bin", index=True),
    "archive renamed, in the index": archive("model-00001-of-00001.safetensors", index=True),
    **{f"pickle for {name}": in_place_of(name) for name in FILES},
}

STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
SEEN = ("exec", "import", "pickle.find_class", "ctypes.dlopen", *STARTED)
# Where code may come from: Python, what is installed, and the package.
TRUSTED = tuple(
    os.path.realpath(place)
    for place in (*sysconfig.get_paths().values(), Path(mlx_onevision.__file__).parents[1])
)


class Watch:
    """What runs in this process while it is ``active``. ``known`` : what a good checkpoint has run,
    its chat template, which Jinja makes code of.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.known: list[tuple[str, Any]] = []
        self.active = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in SEEN:
            return
        what = arguments[0]
        if event == "exec":
            file = what.co_filename
        elif event == "import":
            root = what.partition(".")[0]
            if root in sys.stdlib_module_names or root in sys.modules:
                return
            file = ""
        elif event == "subprocess.Popen":  # the child that renders templates
            file = next((part for part in arguments[1] if part.endswith(".py")), "")
        else:
            file = ""
        if not file.startswith((*TRUSTED, "<frozen")) and (event, what) not in self.known:
            self.events.append((event, what))

    @contextmanager
    def watching(self) -> Iterator[list[tuple[str, Any]]]:
        self.events, self.active = [], True
        try:
            yield self.events
        finally:
            self.active = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, watch: Watch) -> Path:
    folder = write(tmp_path_factory.mktemp("good") / "model")
    with load(folder) as model:  # imports what is needed
        use(model)
    with watch.watching() as events, load(folder) as model:
        use(model)
    assert [event for event, _ in events] == ["exec"], events
    watch.known = events
    return folder


ASKED = [{"role": "user", "content": "hello"}]


def use(model: Model) -> None:
    model.render(ASKED)
    model.generate("hello", max_tokens=1)


def test_there_are_sixty() -> None:
    assert len(CHECKPOINTS) >= 60


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_checkpoint_runs_code(good: Path, tmp_path: Path, watch: Watch, name: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(good, folder)
    CHECKPOINTS[name](folder, marker)
    with watch.watching() as events:
        try:
            with load(folder) as model:
                use(model)
        except OneVisionError as error:
            assert len(str(error)) < 500 and "\n" not in str(error)
    assert events == []
    assert not marker.exists()


def test_the_watch_sees_what_it_is_for(tmp_path: Path, watch: Watch) -> None:
    marker = tmp_path / "marker"
    with watch.watching() as events:
        pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists() and ("pickle.find_class", "builtins") in events


def test_no_other_file_runs_code(good: Path, tmp_path: Path, watch: Watch) -> None:
    """Prompt caches, vectors and adapters that are pickles under another name, or hold some."""
    marker = tmp_path / "marker"
    data = pickle.dumps(Payload(marker), 4)
    objects = io.BytesIO()
    np.savez(objects, vectors=np.array([Payload(marker)], object), allow_pickle=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (adapter / "adapter_model.bin").write_bytes(data)
    (adapter / "adapter_model.safetensors").write_bytes(data)
    with load(good) as model, watch.watching() as events:
        for content in (data, objects.getvalue(), base64.b64encode(data)):
            (tmp_path / "file").write_bytes(content)
            with pytest.raises(OneVisionError):
                model.load_prompt_cache(tmp_path / "file")
            with pytest.raises(OneVisionError):
                Embeddings.load(tmp_path / "file")
        with pytest.raises(OneVisionError):
            load(good, adapter=adapter)
    assert events == []
    assert not marker.exists()
