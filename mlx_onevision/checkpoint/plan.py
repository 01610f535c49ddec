# pyright: reportUnknownMemberType=false
"""What will be made of a checkpoint, before a byte of it is read.

A plan knows the name, dtype and shape of every tensor, so sizes are known and headers can be
written first. Its transforms then make the tensors, one module at a time. The loader that quantizes
and the converter run the same transforms, so what they make is the same bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.checkpoint.tensors import Tensor, bits_per_value, written_name
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.quantization import ModuleQuantization, Quantization
from mlx_onevision.errors import CheckpointError, RequestError, short

# safetensors' words for the types that weights may have, and MLX's.
FLOATS: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
CODES = {name: code for code, name in FLOATS.items()}

PATCHES = "vision_tower.embeddings.patch_embedding.weight"
POSITIONS = "vision_tower.embeddings.position_embedding.weight"
PARTS = ("weight", "scales", "biases")
Change = Callable[[mx.array], mx.array]
NOT_ZERO_AT_ZERO = frozenset({"sigmoid"})


@dataclass(frozen=True)
class OutputTensor:
    """One tensor that a transform makes; ``dtype`` is safetensors' word for its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * bits_per_value(self.dtype) // 8


@dataclass(frozen=True)
class TensorTransform:
    """One tensor, or the two or three of a quantized module, from the files to the model.

    sources : the tensors on disk; for a quantized module its weight, scales and biases.
    dtype : MLX's name for the type of what is not quantized.
    values : how many numbers the weights stand for.
    dequantize_spec, spec : how the module is quantized on disk, if that is to be undone, and how it
        is to be quantized; None: not.
    padding : rows and columns of zeros to add.
    change : what to make of the dequantized values before they are padded, in float32.
    """

    sources: tuple[Tensor, ...]
    outputs: tuple[OutputTensor, ...]
    dtype: str
    values: int
    dequantize_spec: ModuleQuantization | None = None
    spec: ModuleQuantization | None = None
    padding: tuple[int, int] = (0, 0)
    change: Change | None = None

    def run(self, take: Callable[[Tensor], mx.array]) -> list[tuple[str, mx.array]]:
        """The outputs' arrays by their canonical names, not evaluated yet."""
        arrays = [take(tensor) for tensor in self.sources]
        if self.dequantize_spec is not None:
            biases = arrays[2] if len(arrays) == 3 else None
            settings: dict[str, Any] = dataclasses.asdict(self.dequantize_spec)
            arrays = [mx.dequantize(arrays[0], arrays[1], biases, **settings)]
        if self.change is not None:
            arrays = [self.change(arrays[0].astype(mx.float32))]
        arrays = [self._converted(array) for array in arrays]
        if any(self.padding):
            (array,) = arrays
            arrays = [mx.pad(array, [(0, more) for more in self.padding[: array.ndim]])]
        if self.spec is not None:
            arrays = list(mx.quantize(arrays[0], **dataclasses.asdict(self.spec)))
        for output, array in zip(self.outputs, arrays, strict=True):
            if array.shape != output.shape:
                raise CheckpointError(
                    f"MLX made {output.name} of the shape {list(array.shape)}; "
                    f"planned was {list(output.shape)}"
                )
        return [(output.name, array) for output, array in zip(self.outputs, arrays, strict=True)]

    def _converted(self, array: mx.array) -> mx.array:
        if self.outputs[0].name == PATCHES and array.shape != self.outputs[0].shape:
            array = array.transpose(0, 2, 3, 1)  # PyTorch's order to MLX's, channels last
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(getattr(mx, self.dtype))
        return array


class LazyTensorFiles:
    """Lazy arrays of weight files. Each can be taken once, so that nothing else keeps it alive."""

    def __init__(self) -> None:
        self._open: dict[Path, dict[str, mx.array]] = {}

    def take(self, tensor: Tensor) -> mx.array:
        """A tensor's array; its file is opened now and read when the array is evaluated. Of a
        part of a tensor, the bytes are read now, and no others.

        Raises:
            CheckpointError: if MLX does not read the file, or not as its header was understood.
        """
        if tensor.part is not None:
            return _read_part(tensor, *tensor.part)
        if tensor.file not in self._open:
            try:
                loaded: Any = mx.load(str(tensor.file))
            except RuntimeError as error:
                raise CheckpointError(
                    f"MLX cannot read {tensor.file.name}: {short(str(error))}"
                ) from None
            self._open[tensor.file] = loaded
        array = self._open[tensor.file].pop(tensor.source, None)
        if array is None or array.shape != tensor.shape:
            raise CheckpointError(f"{tensor.file.name} changed while it was being opened")
        return array


def _read_part(tensor: Tensor, axis: int, number: int, parts: int) -> mx.array:
    whole = list(tensor.shape)
    whole[axis] *= parts
    # numpy has no bfloat16; the values' bits pass through it as integers.
    bits = np.dtype(f"u{bits_per_value(tensor.dtype) // 8}")
    try:
        mapped = np.memmap(tensor.file, bits, "r", tensor.start, tuple(whole))
    except (OSError, ValueError):
        raise CheckpointError(f"{tensor.file.name} changed while it was being opened") from None
    first = number * tensor.shape[axis]
    index = (slice(None),) * axis + (slice(first, first + tensor.shape[axis]),)
    array = mx.array(np.ascontiguousarray(mapped[index]))
    name = FLOATS.get(tensor.dtype)
    return array if name is None else array.view(getattr(mx, name))


@dataclass(frozen=True)
class ConversionPlan:
    """What will be made. ``config`` describes it, its quantization by the names that are written.

    specs : how each quantized module will be quantized, by canonical name.
    skipped : modules that the recipe would quantize and whose width does not divide into groups.
    dtype : MLX's name for the type of what is not quantized.
    """

    config: OneVisionConfig
    transforms: tuple[TensorTransform, ...]
    specs: Mapping[str, ModuleQuantization]
    skipped: tuple[str, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for one in self.transforms for output in one.outputs)

    @property
    def values(self) -> int:
        return sum(transform.values for transform in self.transforms)


def make_plan(
    config: OneVisionConfig,
    tensors: Mapping[str, Tensor],
    quantized: Mapping[str, ModuleQuantization],
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    changes: Mapping[str, Change] | None = None,
) -> ConversionPlan:
    """Plans a model from a checkpoint's tensors, which have been held against its configuration.

    tensors : by canonical name.
    quantized : how the modules that are quantized on disk are, by canonical name.
    recipe : quantizes; None leaves matrices as they are.
    dtype : float16, bfloat16 or float32 for all that is not quantized; None keeps the checkpoint's,
        or where it mixes them the type that config.json names, or else the one that most bytes
        have.
    dequantize : dequantizes first what is quantized.
    changes : what changes the values of a module's matrix, or of another tensor, by its name; one
        that is quantized stays quantized as it is.

    Raises:
        RequestError: for quantizing what is quantized already, and rules that match nothing.
    """
    if recipe is not None and quantized and not dequantize:
        raise RequestError(
            "the model is quantized already; take the unquantized one, or quantize it anew with "
            "--dequantize"
        )
    if dequantize and not quantized:
        raise RequestError("the model is not quantized; leave --dequantize out")
    floating = dtype or _one_dtype(tensors.values(), config.dtype)
    shapes = _shapes(tensors, quantized)
    chosen: dict[str, ModuleQuantization] = {}
    skipped: list[str] = []
    width = config.vision_config.intermediate_size
    if recipe is not None:
        matrices = [m for m in shapes if m not in tensors and f"{m}.weight" != POSITIONS]
        chosen = _chosen_specs(recipe, matrices, config.text_config.num_hidden_layers)
        width = _padded_width(config, chosen)
        widths = {m: width if m.endswith(".mlp.fc2") else shapes[m][-1] for m in chosen}
        skipped = [m for m, spec in chosen.items() if widths[m] % spec.group_size]
        chosen = {m: spec for m, spec in chosen.items() if m not in skipped}
    more = width - config.vision_config.intermediate_size
    specs = {**({} if dequantize else quantized), **chosen}
    transforms = [
        _transform(
            module,
            shape,
            tensors,
            floating,
            quantized,
            chosen,
            dequantize,
            more,
            (changes or {}).get(module),
        )
        for module, shape in shapes.items()
    ]
    made = dataclasses.replace(
        config,
        vision_config=dataclasses.replace(config.vision_config, intermediate_size=width),
        quantization=_quantization_entry(specs, shapes),
        dtype=floating,
    )
    return ConversionPlan(made, tuple(transforms), specs, tuple(skipped), floating)


def _shapes(
    tensors: Mapping[str, Tensor], quantized: Mapping[str, ModuleQuantization]
) -> dict[str, tuple[int, ...]]:
    """Every matrix by its module, everything else by its own name, with the unquantized shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in quantized and part in PARTS:
            if part == "weight":
                columns = tensor.shape[1] * 32 // quantized[module].bits
                shapes[module] = (tensor.shape[0], columns)
            continue
        is_matrix = part == "weight" and len(tensor.shape) == 2 and name != POSITIONS
        shapes[module if is_matrix else name] = tensor.shape
    return shapes


def _chosen_specs(
    recipe: Recipe, modules: Iterable[str], layers: int
) -> dict[str, ModuleQuantization]:
    names = {module: written_name(module) for module in modules}
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in names.values()):
            nothing = f"no module of the model matches the rule for '{rule.pattern}'"
            if rule.matches(written_name("lm_head")):
                nothing += ": its embedding is its head, too; use '*.embed_tokens'"
            raise RequestError(nothing)
    found = {module: recipe.spec(name, layers) for module, name in names.items()}
    return {module: spec for module, spec in found.items() if spec is not None}


def _padded_width(config: OneVisionConfig, chosen: Mapping[str, ModuleQuantization]) -> int:
    """The width of the tower's MLPs with which their second matrices divide into groups.

    The zeros are exact: the rows that they add to the first matrix give 0, which every activation
    but one leaves 0, and so the columns that they add to the second are multiplied by 0.
    """
    vision = config.vision_config
    groups = [
        spec.group_size
        for module, spec in chosen.items()
        if module.startswith("vision_tower.") and module.endswith(".mlp.fc2")
    ]
    if not groups or vision.hidden_act in NOT_ZERO_AT_ZERO:
        return vision.intermediate_size
    return -(-vision.intermediate_size // max(groups)) * max(groups)


def _transform(
    module: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    floating: str,
    quantized: Mapping[str, ModuleQuantization],
    chosen: Mapping[str, ModuleQuantization],
    dequantize: bool,
    more: int,
    change: Change | None,
) -> TensorTransform:
    """The transform of one entry of :func:`_shapes`; ``more`` is how much the tower's MLPs grow."""
    values = math.prod(shape)
    if module in tensors:  # a tensor that is no matrix
        tensor = tensors[module]
        padding = (more if module.endswith(".mlp.fc1.bias") else 0, 0)
        shape = (shape[0] + padding[0], *shape[1:])
        if module == PATCHES and shape[1] != shape[2]:
            shape = (shape[0], *shape[2:], shape[1])
        output = OutputTensor(module, _code(tensor, floating), shape)
        return TensorTransform(
            (tensor,), (output,), floating, values, padding=padding, change=change
        )
    sources = tuple(tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors)
    if module in quantized and not dequantize and change is None:
        outputs = tuple(OutputTensor(t.name, _code(t, floating), t.shape) for t in sources)
        return TensorTransform(sources, outputs, floating, values)
    padding = (0, 0)
    if module.startswith("vision_tower."):
        padding = (more * module.endswith(".mlp.fc1"), more * module.endswith(".mlp.fc2"))
    rows, columns = shape[0] + padding[0], shape[1] + padding[1]
    spec, code = chosen.get(module), CODES[floating]
    if module in quantized and not dequantize:
        spec = quantized[module]
    dtypes, shapes = (code,), ((rows, columns),)
    if spec is not None:
        groups = (rows, columns // spec.group_size)
        dtypes = ("U32", code, code) if spec.mode == "affine" else ("U32", "U8")
        shapes = ((rows, columns * spec.bits // 32), groups, groups)
    outputs = tuple(
        OutputTensor(f"{module}.{part}", dtype, shape)
        for part, dtype, shape in zip(PARTS, dtypes, shapes, strict=False)
    )
    before = quantized.get(module)
    return TensorTransform(sources, outputs, floating, values, before, spec, padding, change)


def _code(tensor: Tensor, floating: str) -> str:
    return CODES[floating] if tensor.dtype in FLOATS else tensor.dtype


def _quantization_entry(
    specs: Mapping[str, ModuleQuantization], shapes: Mapping[str, tuple[int, ...]]
) -> Quantization | None:
    """The entry of config.json: how most values are quantized, and the modules that differ."""
    if not specs:
        return None
    values = dict.fromkeys(specs.values(), 0)
    for module, spec in specs.items():
        values[spec] += math.prod(shapes[module])
    default = max(values, key=lambda spec: values[spec])
    named = {written_name(module): spec for module, spec in specs.items() if spec != default}
    return Quantization(default, named)


def _one_dtype(tensors: Iterable[Tensor], named: str | None) -> str:
    """The type that runs through the network: the one that all floating-point tensors share, or
    else the one that is named, or that most bytes have.
    """
    count = dict.fromkeys(FLOATS, 0)
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            count[tensor.dtype] += tensor.stop - tensor.start
    if named is not None and sum(map(bool, count.values())) != 1:
        return named
    return FLOATS[max(count, key=lambda dtype: count[dtype])]
