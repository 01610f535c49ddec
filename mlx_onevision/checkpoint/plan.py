"""What will be made of a checkpoint, before a byte of it is read.

A plan knows the name, type and shape of every tensor, so sizes can be told and headers written
first; its steps make them (:mod:`packing`). Recipes say which matrices are packed, and how.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.checkpoint.tensors import BITS as BITS_OF
from mlx_onevision.checkpoint.tensors import Tensor, written_name
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.quantization import ModuleQuantization, Quantization
from mlx_onevision.errors import CheckpointError, RequestError

# From the tensors of a checkpoint to those of the model that is wanted, one module at a time.
#
# The loader that quantises and the converter take the same steps, so what they make is the same bit
# for bit.

# safetensors' words for the types that weights may have, and MLX's.
FLOATS: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
CODES = {name: code for code, name in FLOATS.items()}

PATCHES = "vision_tower.embeddings.patch_embedding.weight"
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class OutputTensor:
    """One tensor that a step makes; ``dtype`` is safetensors' word for its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS_OF[self.dtype] // 8


@dataclass(frozen=True)
class TensorTransform:
    """One tensor, or the two or three of a packed module, from the files to the model.

    sources : the tensors on disk; for a packed module its weight, scales and biases.
    unpack, pack : how the module is packed on disk and should be; None: not.
    dtype : MLX's name for the type of what is not packed.
    pad : rows and columns of zeros to add.
    values : how many numbers the weights stand for.
    """

    sources: tuple[Tensor, ...]
    outputs: tuple[OutputTensor, ...]
    dtype: str
    values: int
    dequantize_spec: ModuleQuantization | None = None
    spec: ModuleQuantization | None = None
    padding: tuple[int, int] = (0, 0)

    def run(self, take: Callable[[Tensor], mx.array]) -> list[tuple[str, mx.array]]:
        """The pieces' arrays by their canonical names, not evaluated yet."""
        arrays = [take(tensor) for tensor in self.sources]
        if self.dequantize_spec is not None:
            weight, scales, *biases = arrays
            spec = self.dequantize_spec
            whole = mx.dequantize(
                weight, scales, *biases, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
            )
            arrays = [whole]
        arrays = [self._plain(array) for array in arrays]
        if any(self.padding):
            (array,) = arrays
            widths = [(0, more) for more in self.padding[: array.ndim]]
            arrays = [mx.pad(array, widths)]
        if self.spec is not None:
            arrays = list(mx.quantize(arrays[0], **dataclasses.asdict(self.spec)))
        for output, array in zip(self.outputs, arrays, strict=True):
            if array.shape != output.shape:
                raise CheckpointError(
                    f"MLX made {output.name} of the shape {list(array.shape)}; "
                    f"planned was {list(output.shape)}"
                )
        return [(output.name, array) for output, array in zip(self.outputs, arrays, strict=True)]

    def _plain(self, array: mx.array) -> mx.array:
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
        """A tensor's array; its file is opened now and read when the array is evaluated.

        Raises:
            CheckpointError: if the file is no longer what its header said.
        """
        if tensor.file not in self._open:
            loaded: Any = mx.load(str(tensor.file))
            self._open[tensor.file] = loaded
        array = self._open[tensor.file].pop(tensor.source)
        if array.shape != tensor.shape:
            raise CheckpointError(f"{tensor.file.name} changed while it was being opened")
        return array


POSITIONS = "vision_tower.embeddings.position_embedding.weight"
NOT_ZERO_AT_ZERO = frozenset({"sigmoid"})


@dataclass(frozen=True)
class ConversionPlan:
    """What will be made. ``config`` describes it, its quantization by the names that are written.

    ways : how each packed module will be packed, by canonical name.
    left : modules that the recipe would pack and whose width does not divide into its groups.
    dtype : MLX's name for the type of what is not packed.
    """

    config: OneVisionConfig
    transforms: tuple[TensorTransform, ...]
    specs: Mapping[str, ModuleQuantization]
    skipped: tuple[str, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for step in self.transforms for output in step.outputs)

    @property
    def values(self) -> int:
        return sum(step.values for step in self.transforms)


def make_plan(
    config: OneVisionConfig,
    tensors: Mapping[str, Tensor],
    quantized: Mapping[str, ModuleQuantization],
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
) -> ConversionPlan:
    """Plans a model from a checkpoint's tensors, which have been held against its configuration.

    tensors : by canonical name.
    packed : how the modules that are packed on disk are, by canonical name.
    recipe : packs; None leaves matrices as they are.
    dtype : float16, bfloat16 or float32 for all that is not packed; None keeps the checkpoint's, or
        where it mixes them the type that config.json names, or else the one that most bytes have.
    dequantize : unpacks first what is packed.

    Raises:
        RequestError: for packing what is packed already, and rules that match nothing.
    """
    if recipe is not None and quantized and not dequantize:
        raise RequestError(
            "the model is quantized already; take the unquantized one, or pack what is left of it "
            "anew with --dequantize"
        )
    if dequantize and not quantized:
        raise RequestError("the model is not quantized; leave --dequantize out")
    floating = dtype or _one_dtype(tensors.values(), config.dtype)
    shapes = _shapes(tensors, quantized)
    chosen: dict[str, ModuleQuantization] = {}
    skipped: list[str] = []
    wide = config.vision_config.intermediate_size
    if recipe is not None:
        matrices = [m for m in shapes if m not in tensors and f"{m}.weight" != POSITIONS]
        chosen = _chosen_specs(recipe, matrices, config.text_config.num_hidden_layers)
        wide = _padded_width(config, chosen)
        widths = {m: wide if m.endswith(".mlp.fc2") else shapes[m][-1] for m in chosen}
        skipped = [m for m, spec in chosen.items() if widths[m] % spec.group_size]
        chosen = {m: spec for m, spec in chosen.items() if m not in skipped}
    more = wide - config.vision_config.intermediate_size
    kept = {} if dequantize else quantized
    transforms = [
        _transform(module, shape, tensors, floating, quantized, chosen, dequantize, more)
        for module, shape in shapes.items()
    ]
    specs = {**kept, **chosen}
    made = dataclasses.replace(
        config,
        vision_config=dataclasses.replace(config.vision_config, intermediate_size=wide),
        quantization=_described(specs, shapes),
        dtype=floating,
    )
    return ConversionPlan(made, tuple(transforms), specs, tuple(skipped), floating)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be packed: a linear layer's weight, or the embedding table."""
    return name.endswith(".weight") and len(shape) == 2 and name != POSITIONS


def _shapes(
    tensors: Mapping[str, Tensor], quantized: Mapping[str, ModuleQuantization]
) -> dict[str, tuple[int, ...]]:
    """Every matrix by its module, everything else by its own name, with the unpacked shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in quantized and part in PARTS:
            if part == "weight":
                columns = tensor.shape[1] * 32 // quantized[module].bits
                shapes[module] = (tensor.shape[0], columns)
        else:
            shapes[module if _is_matrix(name, tensor.shape) else name] = tensor.shape
    return shapes


def _chosen_specs(
    recipe: Recipe, modules: Iterable[str], layers: int
) -> dict[str, ModuleQuantization]:
    names = {module: written_name(module) for module in modules}
    unused = [
        rule.pattern
        for rule in recipe.rules
        if not any(rule.matches(name) for name in names.values())
    ]
    if unused:
        raise RequestError(f"no module of the model matches the rule for '{unused[0]}'")
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
) -> TensorTransform:
    """The step of one entry of :func:`_shapes`; ``more`` is how much the tower's MLPs grow."""
    values = math.prod(shape)
    if module in tensors:  # a lone tensor
        tensor = tensors[module]
        padding = (more if module.endswith(".mlp.fc1.bias") else 0, 0)
        shape = (shape[0] + padding[0], *shape[1:]) if shape else shape
        if module == PATCHES and shape[1] != shape[2]:
            shape = (shape[0], *shape[2:], shape[1])
        code = CODES[floating] if tensor.dtype in FLOATS else tensor.dtype
        return TensorTransform(
            (tensor,), (OutputTensor(module, code, shape),), floating, values, padding=padding
        )
    sources = tuple(tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors)
    if module in quantized and not dequantize:
        outputs = tuple(
            OutputTensor(t.name, CODES[floating] if t.dtype in FLOATS else t.dtype, t.shape)
            for t in sources
        )
        return TensorTransform(sources, outputs, floating, values)
    padding = (0, 0)
    if module.startswith("vision_tower."):
        padding = (more * module.endswith(".mlp.fc1"), more * module.endswith(".mlp.fc2"))
    shape = (shape[0] + padding[0], shape[1] + padding[1])
    spec = chosen.get(module)
    outputs = _output_tensors(module, shape, spec, floating)
    return TensorTransform(sources, outputs, floating, values, quantized.get(module), spec, padding)


def _output_tensors(
    module: str, shape: tuple[int, ...], spec: ModuleQuantization | None, floating: str
) -> tuple[OutputTensor, ...]:
    rows, columns = shape
    if spec is None:
        return (OutputTensor(f"{module}.weight", CODES[floating], shape),)
    weight = OutputTensor(f"{module}.weight", "U32", (rows, columns * spec.bits // 32))
    groups = (rows, columns // spec.group_size)
    if spec.mode != "affine":
        return weight, OutputTensor(f"{module}.scales", "U8", groups)
    code = CODES[floating]
    return (
        weight,
        OutputTensor(f"{module}.scales", code, groups),
        OutputTensor(f"{module}.biases", code, groups),
    )


def _described(
    specs: Mapping[str, ModuleQuantization], shapes: Mapping[str, tuple[int, ...]]
) -> Quantization | None:
    """The entry of config.json: the packing of most values, and the modules that differ from it."""
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
