"""What Python's clients make of a server with their defaults: one line of JSON for each thing that
they were asked to do. In a process of its own, as they leave connections open.

    python python_clients.py BASE_URL IMAGE
"""

import base64
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network

import instructor
import litellm
import ollama
import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, DATA = sys.argv[1], Path(sys.argv[2]).read_bytes()
QUESTION = "What is in the image?"
PLACE = {"url": f"data:image/png;base64,{base64.b64encode(DATA).decode()}"}
CONTENT: Any = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": PLACE}]
MESSAGES: Any = [{"role": "user", "content": CONTENT}]


class Shape(BaseModel):
    """A shape of the image."""

    shape: Literal["circle", "square", "triangle"]
    count: Literal[1, 2, 3]


class Free(BaseModel):
    """What is seen."""

    shape: str
    colours: list[str]


def tell(name: str, ask: Callable[[], Any]) -> None:
    try:
        value = ask()
        told = {"value": value.model_dump() if isinstance(value, BaseModel) else value}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"name": name, **told}), flush=True)


def with_instructor() -> None:
    own = openai.OpenAI(base_url=URL, api_key="unused")
    for mode in ("TOOLS", "JSON_SCHEMA", "JSON", "MD_JSON"):
        asked = instructor.from_openai(own, mode=instructor.Mode[mode]).chat.completions
        for wanted in (Shape, Free):
            tell(
                f"instructor: {mode}, {wanted.__name__}",
                lambda asked=asked, wanted=wanted: asked.create(
                    model="demo", messages=MESSAGES, response_model=wanted
                ),
            )


@tool
def count(colour: str) -> int:
    """Counts shapes."""
    return 3


def with_langchain() -> None:
    to: dict[str, Any] = {"base_url": URL, "api_key": "unused", "model": "demo"}
    model, asked = ChatOpenAI(**to), [HumanMessage(CONTENT)]
    tell("langchain: text", lambda: model.invoke(asked).content)
    tell("langchain: stream", lambda: "".join(str(p.content) for p in model.stream(asked)))
    for method in ("function_calling", "json_schema", "json_mode"):
        for wanted in (Shape, Free):
            shaped = model.with_structured_output(wanted, method=method)
            tell(f"langchain: {method}, {wanted.__name__}", lambda s=shaped: s.invoke(asked))
    tell("langchain: bind_tools", lambda: model.bind_tools([count]).invoke(asked).content)

    def loop(choice: str) -> list[Any]:
        called = model.bind_tools([count], tool_choice=choice).invoke(asked)
        (call,) = called.tool_calls
        returned = ToolMessage("3", tool_call_id=call["id"])
        last = model.bind_tools([count]).invoke([*asked, called, returned])
        return [call["name"], list(call["args"]), bool(last.content)]

    for choice in ("any", "count"):
        tell(f"langchain: called, {choice}", lambda choice=choice: loop(choice))
    responses: Any = ChatOpenAI(**to, use_responses_api=True)
    tell("langchain: responses", lambda: responses.invoke(asked).content[0]["text"])
    vectors = OpenAIEmbeddings(**to, check_embedding_ctx_length=False)
    tell("langchain: embed", lambda: len(vectors.embed_query("a red circle")))
    bare = ChatOpenAI(**{**to, "base_url": URL.removesuffix("/v1")})
    tell("langchain: without /v1", lambda: bare.invoke(asked).content)
    other = ChatOpenAI(**{**to, "model": "gpt-4o"})
    tell("langchain: another model", lambda: other.invoke(asked).content)


def with_litellm() -> None:
    to: Any = {"model": "openai/demo", "api_base": URL, "api_key": "unused"}
    asked = {**to, "messages": MESSAGES}
    complete: Any = litellm.completion
    embed: Any = litellm.embedding

    def text(**settings: Any) -> Any:
        return complete(**asked, **settings).choices[0].message.content

    def streamed() -> str:
        chunks = complete(**asked, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    tell("litellm: text", text)
    tell("litellm: stream", streamed)
    tell("litellm: schema, Shape", lambda: json.loads(text(response_format=Shape)))
    tell("litellm: embed", lambda: len(embed(**to, input=["a red circle"]).data[0]["embedding"]))


def with_ollama() -> None:
    own = ollama.Client(host=URL.removesuffix("/v1"))
    asked: Any = [{"role": "user", "content": QUESTION, "images": [DATA]}]
    told: Any = {"prompt": QUESTION, "images": [DATA]}

    def text(**settings: Any) -> Any:
        return own.chat("demo", messages=asked, **settings).message.content

    tell("ollama: text", text)
    chunks = partial(own.chat, "demo", messages=asked, stream=True)
    tell("ollama: stream", lambda: "".join(chunk.message.content or "" for chunk in chunks()))
    tell("ollama: generate", lambda: own.generate("demo", **told).response)
    tell("ollama: tools", lambda: text(tools=[{"function": {"name": "count"}}]))
    tell("ollama: schema, Free", lambda: json.loads(text(format=Free.model_json_schema())))
    tell("ollama: listed", lambda: [model.model for model in own.list().models])
    tell("ollama: another model", lambda: own.chat("gpt-4o", messages=asked).message.content)


def with_pydantic_ai() -> None:
    asked = [QUESTION, BinaryContent(DATA, media_type="image/png")]
    provider = OpenAIProvider(base_url=URL, api_key="unused")
    outputs: dict[str, Any] = {"default, Shape": Shape, "default, Free": Free}
    outputs |= {"native, Shape": NativeOutput(Shape), "prompted, Shape": PromptedOutput(Shape)}
    outputs |= {"either": [Shape, Free]}
    looked: list[int] = []

    def look() -> str:
        """Look once more."""
        looked.append(1)
        return "seen"

    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("demo", provider=provider)
        named = "pydantic_ai" if kind is OpenAIChatModel else "pydantic_ai responses"
        tell(f"{named}: text", lambda model=model: Agent(model).run_sync(asked).output)

        def twice(model: Any = model) -> str:
            history = Agent(model).run_sync(asked).all_messages()
            return Agent(model).run_sync("How many shapes?", message_history=history).output

        tell(f"{named}: second turn", twice)
        for output, wanted in outputs.items():
            agent: Any = Agent(model, output_type=wanted)
            tell(f"{named}: {output}", lambda agent=agent: agent.run_sync(asked).output)

        def with_tools(wanted: Any, model: Any = model) -> Any:
            looked.clear()
            found = Agent(model, tools=[look], output_type=wanted).run_sync(asked).output
            return found if wanted is str else {**found.model_dump(), "looked": len(looked)}

        tell(f"{named}: tools, text", lambda with_tools=with_tools: with_tools(str))
        tell(f"{named}: tools, Shape", lambda with_tools=with_tools: with_tools(Shape))


with_instructor()
with_langchain()
with_litellm()
with_ollama()
with_pydantic_ai()
