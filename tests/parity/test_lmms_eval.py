"""The adapter of lmms-eval inside the real lmms-eval: prompts equal to those of its own model of
LLaVA-OneVision, and tasks evaluated from end to end on the demo model.
"""

# pyright: reportMissingImports=false
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.checkpoints import Tiny
from parity.pairs import Checkpoints
from parity.reference_adapter import reference, request
from PIL import Image

from mlx_onevision.api import Model, load
from mlx_onevision.plugins.hosts.lmms_eval.prompts import (
    CHAT_TEMPLATE,
    answered,
    conversation,
    options,
    shown,
)
from mlx_onevision.prompt.chat_template import ChatTemplate

from lmms_eval.api.instance import GenerationResult  # isort: skip
from lmms_eval.evaluator import simple_evaluate  # isort: skip
from lmms_eval.models import get_model, get_model_manifest  # isort: skip
from lmms_eval.tasks import TaskManager  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of lmms-eval and of what it imports

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES, SQUARE, CIRCLE = (EXAMPLES / name for name in ("shapes.png", "square.png", "circle.mp4"))
WIDE, TALL = Image.new("RGB", (80, 40), "red"), Image.new("RGB", (40, 80), "blue")
CHAT = json.dumps([{"value": "Is <image> red?"}, {"value": "Yes."}, {"value": "Really?"}])
VIDEO = {"task_type": "video", "sample_frames": 4}

CASES: dict[str, tuple[str, list[Any] | None, dict[str, Any]]] = {
    "text alone": ("What is this?", None, {}),
    "no pictures": ("What is this?", [], {}),
    "one picture": ("What is this?\nAnswer in one word.", [WIDE], {}),
    "two pictures": ("Which is larger?", [WIDE, TALL], {}),
    "seven pictures": ("Which is larger?", [WIDE, TALL] * 3 + [WIDE], {}),
    "pictures between words": ("Is <image> or <image> red?", [WIDE, TALL], {}),
    "marks alone": ("<image><image>", [WIDE, TALL], {}),
    "fewer marks": ("Is <image> red?", [WIDE, TALL], {}),
    "a video": ("What happens?", ["a.mp4"], {}),
    "a marked video": ("In <image>, what happens?", ["a.mp4"], {}),
    "a video and its subtitles": ("What happens?", ["a.mp4", "a.srt"], {}),
    "frames": ("What happens?", [Image.new("RGB", (9, 9), (n, n, n)) for n in range(11)], VIDEO),
    "a conversation": (CHAT, [WIDE], {}),
    "a conversation without pictures": (CHAT.replace("<image>", "it"), None, {}),
    "other scripts": (" ¿Qué es? 这是什么？ 🦊\n\n\tfoo ", [TALL], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_the_references(name: str) -> None:
    context, visuals, metadata = CASES[name]
    about = shown(visuals, metadata)
    text = ChatTemplate(CHAT_TEMPLATE).render(conversation(context, about))
    with reference([None]) as (adapter, seen):
        adapter.generate_until(
            [request("generate_until", context, {"until": ["x"]}, lambda _: visuals, **metadata)]
        )
    # There a video has the same mark.
    assert [text.replace("<video>", "<image>")] == seen.prompts
    aspect = {None: "never", "pad": "never", "anyres_max_9": "always"}[seen.aspect]
    assert about.tiling == aspect
    if metadata:
        (video,) = about.blocks
        ours = [frame.getpixel((4, 4)) for frame in video["video"]]
        assert ours == [frame.getpixel((4, 4)) for frame in seen.pictures]
    assert "until" not in seen.settings and not seen.settings.get("do_sample")
    ours = options({"until": ["x"]}, until=False)
    assert ours.get("max_tokens") == seen.settings["max_new_tokens"]


@pytest.mark.parametrize("name", [name for name in CASES if "conversation" not in name])
def test_prompts_of_likelihoods_are_the_references(name: str) -> None:
    context, visuals, metadata = CASES[name]
    about = shown(visuals, metadata)
    turns = answered(context, about, "A red circle.")
    texts = [ChatTemplate(CHAT_TEMPLATE).render(some) for some in (turns[:-1], turns)]
    with reference([None]) as (adapter, seen):
        adapter.metadata = metadata
        adapter.loglikelihood(
            [request("loglikelihood", context, "A red circle.", lambda _: visuals)]
        )
    assert [text.replace("<video>", "<image>") for text in texts] == seen.prompts


def test_it_is_found_by_its_entry_point() -> None:
    manifest = get_model_manifest("mlx_onevision")
    assert manifest.chat_class_path is None
    cls = get_model("mlx_onevision")
    assert cls.__module__ == "mlx_onevision.plugins.hosts.lmms_eval.model" and cls.is_simple


ROWS = [
    (SHAPES, "What is in the image?", "A red circle, a blue star and an orange triangle."),
    (SHAPES, "How many shapes are there?", "There are three shapes."),
    (SQUARE, "What is in the image?", "A green square."),
    (SHAPES, "Where is the star?", "The star is on the left."),  # it is not
]
CHOICES = [
    "A red circle, a blue star and an orange triangle.",
    "A green square.",
    "A yellow circle.",
]

UTILS = f"""
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def clip(doc):
    return [{str(CIRCLE)!r}]

def both(doc):
    return doc_to_visual(doc) + doc_to_visual(doc)

def choices(doc):
    return {CHOICES!r}

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=(), round_idx=0,
           previous_round_info=None):
    if round_idx == 0:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    assert previous_round_info is None
    return both(doc), "How many shapes are there?", False, previous_output, None

def joined(doc, results):
    return {{"joined": " | ".join(results[0])}}

def listed(items):
    return items
"""

TASK = """
dataset_path: {folder}/data
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
task: shapes
output_type: generate_until
generation_kwargs: {{max_new_tokens: 24, until: [" star"], temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

OTHERS = {
    "videos": """
doc_to_visual: !function utils.clip
doc_to_text: "How does the circle move?"
""",
    "choosing": """
output_type: multiple_choice
doc_to_choice: !function utils.choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "in_rounds": """
output_type: generate_until_multi_round
doc_to_text: !function utils.rounds
process_results: !function utils.joined
metric_list:
  - {metric: joined, aggregation: !function utils.listed, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Tasks of drawn pictures, on disk as tasks are."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    names = ("image", "question", "answer")
    columns: dict[str, Any] = dict(zip(names, zip(*ROWS, strict=True), strict=True))
    columns["image"] = [{"path": None, "bytes": path.read_bytes()} for path in columns["image"]]
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
    made = datasets.Dataset.from_dict(columns, features=features)
    (folder / "data").mkdir()
    made.to_parquet(folder / "data/test-00000.parquet")
    (folder / "utils.py").write_text(UTILS)
    (folder / "shapes.yaml").write_text(TASK.format(folder=folder))
    for name, text in OTHERS.items():
        (folder / f"{name}.yaml").write_text(f"include: shapes.yaml\ntask: {name}{text}")
    return TaskManager(include_path=str(folder), include_defaults=False, model_name="mlx_onevision")


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    """The demo model under the same prompts, without lmms-eval."""
    model = load("demo", chat_template=CHAT_TEMPLATE)
    yield model
    model.close()


def evaluated(task: str, tasks: TaskManager, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """A task's figures and samples, as ``python -m lmms_eval`` gets them."""
    arguments = settings.pop("model_args", "pretrained=demo")
    found = simple_evaluate(
        "mlx_onevision", arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **settings
    )
    assert found is not None
    return found["results"][task], found["samples"][task]


def ask(model: Model, picture: Path, question: str) -> str:
    with Image.open(picture) as image:
        about = shown([image.convert("RGB")], {})
        turns = conversation(question, about)
        return model.generate(
            messages=turns, tiling=about.tiling, max_tokens=24, temperature=0
        ).text


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_task_from_end_to_end(tasks: TaskManager, plain: Model, batch_size: int) -> None:
    figures, samples = evaluated("shapes", tasks, batch_size=batch_size)
    ours = [ask(plain, picture, question) for picture, question, _ in ROWS]
    assert [sample["filtered_resps"][0] for sample in samples] == ours
    right = [answer == wanted for answer, (_, _, wanted) in zip(ours, ROWS, strict=True)]
    assert figures["exact_match,none"] == sum(right) / len(right) == 0.75
    counts = [sample["token_counts"][0] for sample in samples]
    assert all(count["input_tokens"] > 50 and count["output_tokens"] > 3 for count in counts)


def test_stop_strings_count_where_they_are_asked_for(tasks: TaskManager) -> None:
    _, samples = evaluated("shapes", tasks, model_args="pretrained=demo,until=True")
    assert samples[0]["filtered_resps"] == ["A red circle, a blue"]


def test_a_video_has_32_frames_from_end_to_end(tasks: TaskManager, plain: Model) -> None:
    _, samples = evaluated("videos", tasks, limit=2)
    answers = {sample["filtered_resps"][0] for sample in samples}
    (count,) = {sample["token_counts"][0]["input_tokens"] for sample in samples}
    video = {"type": "video", "video": str(CIRCLE), "num_frames": 32, "ends": True}
    text = {"type": "text", "text": "\nHow does the circle move?"}
    answer = plain.generate(messages=[{"role": "user", "content": [video, text]}], max_tokens=24)
    assert answers == {answer.text} == {"The circle moves from left to right."}
    assert count == answer.usage.prompt_tokens
    _, samples = evaluated("videos", tasks, model_args="pretrained=demo,max_frames_num=4", limit=1)
    assert samples[0]["token_counts"][0]["input_tokens"] < count


def test_the_likeliest_of_several_answers_is_chosen(tasks: TaskManager, plain: Model) -> None:
    figures, samples = evaluated("choosing", tasks)
    assert figures["acc,none"] == 0.5  # two of the answers are none of the choices
    for sample, (picture, question, wanted) in zip(samples, ROWS, strict=True):
        losses = [loss for loss, _ in sample["filtered_resps"]]
        greedy = [greedy for _, greedy in sample["filtered_resps"]]
        answer = ask(plain, picture, question)
        assert greedy == [answer.startswith(choice) for choice in CHOICES]
        if wanted in CHOICES:
            assert CHOICES[int(np.argmin(losses))] == wanted == answer
            assert min(losses) < sorted(losses)[1] / 2


def test_rounds(tasks: TaskManager, plain: Model) -> None:
    figures, _ = evaluated("in_rounds", tasks, limit=1)
    assert figures["joined,none"] == [f"{ROWS[0][2]} | {count_of_two(plain)}"]


def count_of_two(model: Model) -> str:
    with Image.open(SHAPES) as image:
        about = shown([image.convert("RGB")] * 2, {})
        turns = conversation("How many shapes are there?", about)
        return model.generate(messages=turns, tiling="never", max_tokens=24).text


def test_answers_are_kept_and_found_again(tasks: TaskManager, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first, _ = evaluated("shapes", tasks, use_cache=cache)
    again, samples = evaluated("shapes", tasks, use_cache=cache)
    assert first == again and samples[0]["filtered_resps"] == [ROWS[0][2]]


def test_a_question_that_cannot_be_asked_costs_no_other(tmp_path: Path) -> None:
    shutil.copy(CIRCLE, tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    model = get_model("mlx_onevision")(pretrained="demo", batch_size=3)
    model.task_dict = {"task": {"test": ["good", "bad", "good"]}}
    found = model.generate_until(
        [
            type(made)(made.request_type, (*made.args[:3], place, "task", "test"), 0, made.metadata)
            for place in range(3)
            for made in [
                request(
                    "generate_until",
                    "How does the circle move?",
                    {"max_new_tokens": 24},
                    lambda name: [str(tmp_path / f"{name}.mp4")],
                )
            ]
        ]
    )
    assert all(isinstance(answer, GenerationResult) for answer in found)
    moves = "The circle moves from left to right."
    assert [answer.text for answer in found] == [moves, "", moves]
    model.clean()
    assert model.generate_until([]) == []


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_transformers(checkpoints: Checkpoints, tied: bool) -> None:
    """Of the same tokens: an answer and the end of its turn."""
    tiny = Tiny(tied=tied)
    _, oracle = checkpoints.pair(tiny)
    model = get_model("mlx_onevision")(pretrained=str(checkpoints.hub(tiny)))
    model.task_dict = {"task": {"test": [None]}}
    made = request("loglikelihood", "What is it?", "A red circle.", lambda _: [TALL])
    ((loss, greedy),) = model.loglikelihood([made])
    turns = answered("What is it?", shown([TALL], {}), "A red circle.")
    start = len(model.model.prepare(turns[:-1], tiling="always").input_ids)
    inputs = oracle.prepare_written(model.model.render(turns), [TALL])
    ids = model.model.prepare(turns, tiling="always").input_ids
    np.testing.assert_array_equal(inputs["input_ids"][0], ids)
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    with torch.inference_mode():
        theirs = oracle.model(**inputs, labels=labels)
    assert loss == pytest.approx(float(theirs.loss), abs=1e-5)  # float32 sums in another order
    best = theirs.logits[0, start - 1 : -1].argmax(dim=-1)[:-2]
    assert greedy == bool((best == labels[0, start:-2]).all())
    model.clean()
