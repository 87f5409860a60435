"""The kind of a layer: what it has to answer so that it can be measured, factorized, trained on, saved and merged."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn

from ..maths.factors import Factors, LayerMoments
from ..maths.projection import Layout
from .dense import bias_of, said_of_more
from .low_rank import LowRankLayer
from .parts import shape_of

_NORMS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def note_norm(layer: nn.Module, norm: nn.Module) -> None:
    """A batch norm was seen to read what the layer gives."""
    _NORMS[layer] = weakref.ref(norm)


class Form(Protocol):
    """A layer without its weights; equal ones run equally long."""

    def build(self, rank: int | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The layer with random weights: dense, or low rank."""

    def input(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """A random input of that shape in fp32, laid out as the layer's are."""


class Kind(Layout):
    """What is asked of one layer, dense or low rank, by its kind. The defaults are those of a linear layer.

        kind_of(layer).size  # (out, in)

    A kind is a subclass in a file of `layers/` and a word in `layers.kinds.KINDS`. A layer is a module, or, where several weights
    are parameters of one module, a module that shows one of them (`parts`); either has `weight`, a Parameter, and `bias` or None.
    A weight is one matrix (out, in), or a stack of them (count, out, in) that are cut at one rank.

    Attributes:
        dense: class of the dense layers; subclasses compute something else, and stay dense. low_rank: class of what stands for them.
        label: what users call the dense class.
        is_linear: whether "all-linear" means it. in_blocks: whether "all" takes it in repeated blocks. is_vocabulary: whether it is a table of tokens, which `embeddings` alone takes.
        has_maps: whether its work depends on the size of an image's feature map.
        takes_gradients: whether statistics need the gradient of the output; without, the kind sums what it `see`s in the forward.
        weight_key: what follows the layer's name in the key of its weight.
        note_version: of a note in config.json that names such a layer: who reads older ones alone must not take it for theirs.
    """

    dense: ClassVar[type[nn.Module]]
    low_rank: ClassVar[type[LowRankLayer]]
    label: ClassVar[str]
    is_linear: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = False
    is_vocabulary: ClassVar[bool] = False
    has_maps: ClassVar[bool] = False
    takes_gradients: ClassVar[bool] = True
    weight_key: ClassVar[str] = ".weight"
    note_version: ClassVar[int] = 2

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    # --- where ---

    @classmethod
    def takes(cls, module: nn.Module | None) -> bool:
        """Whether a module is a dense layer of this kind. Subclasses of the dense class may compute something else."""
        return type(module) is cls.dense

    @classmethod
    def parts(cls, module: nn.Module) -> dict[str, nn.Module]:
        """Layers of this kind that are parameters of a module: the parameter's name -> the same layer each time."""
        return {}

    @property
    def seat(self) -> nn.Module | nn.Parameter:
        """What is registered in the model, and gives way to the low-rank layer: the layer, or the parameter that it shows."""
        return self.layer

    def why_dense(self) -> str:
        """Why this layer cannot be factorized although its class can; "" where it can."""
        return said_of_more(self.layer)

    # --- the weight (see `Layout` for how it lies in its parameter) ---

    @property
    def weight(self) -> torch.Tensor:
        """Of a dense layer: the matrix (out, in), or the stack (count, out, in), detached, a view.

        NaN, which no calculation takes for a weight, in its shape, while its values are sharded away (ZeRO-3).
        """
        parameter = cast(torch.Tensor, self.layer.weight)
        weight = parameter.detach()
        if weight.shape != shape_of(parameter):
            weight = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(shape_of(parameter))
        return self.matrix(weight)

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the matrix, or of each of a stack."""
        return self._matrix_shape[-2], self._matrix_shape[-1]

    @property
    def count(self) -> int:
        """How many matrices the weight is."""
        return self._matrix_shape[0] if len(self._matrix_shape) == 3 else 1

    @property
    def _matrix_shape(self) -> torch.Size:
        return self.matrix(torch.empty(self.shapes(1)["dense"], device="meta")).shape

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters "dense", "down" and "up" at a rank."""
        if isinstance(self.layer, LowRankLayer):
            m, n = self.layer.out_features, self.layer.in_features
        else:
            m, n = shape_of(cast(torch.Tensor, self.layer.weight))
        return {"dense": (m, n), "down": (rank, n), "up": (m, rank)}

    def rank_of(self, part: str, shape: Sequence[int]) -> int:
        """The rank that a factor of this shape has; 0 where it is no such factor's."""
        one, two = self.shapes(1)[part], self.shapes(2)[part]
        grows = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
        at = grows[0]
        return int(shape[at]) // (two[at] - one[at]) if len(shape) == len(one) else 0

    @property
    def norm(self) -> nn.Module | None:
        """A batch norm that takes the output, as far as one was seen (`note_norm`): it takes a constant away that is added there."""
        found = _NORMS.get(self.layer)
        return None if found is None else found()

    @property
    def takes_mean(self) -> bool:
        """Whether what the mean input gives has a place of its own: a bias, or the running mean of a norm."""
        return bias_of(self.layer) is not None or self.norm is not None

    # --- its low-rank stand-in ---

    def stand_in(self, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0) -> LowRankLayer:
        """A layer with these factors, (r, in) and (out, r) or stacks of them, and everything else taken from this one.

        With no factors (then `rank` is needed) the weights are NaN until they are loaded: what is forgotten shows.
        """
        raise NotImplementedError

    def filled(self, part: str, matrix: torch.Tensor | None, rank: int, like: torch.Tensor) -> nn.Parameter:
        """A new parameter for a factor, of the weight's dtype, device and requires_grad; NaN without values."""
        shape = self.shapes(rank)[part]
        data = torch.empty(shape, dtype=like.dtype, device=like.device)
        data.fill_(torch.nan) if matrix is None else data.copy_(self.tensor(matrix, part, shape))
        return nn.Parameter(data, requires_grad=like.requires_grad)

    def tensors(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) of ready-made factors, as they lie in the parameters of the stand-in."""
        shapes = self.shapes(factors.down.shape[-2])
        return self.tensor(factors.down, "down", shapes["down"]), self.tensor(factors.up, "up", shapes["up"])

    def standing_in(self, factors: Factors) -> Any:
        """Let the dense layer answer as its factors would, until the handle that this returns is removed."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            x = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            return self.answer(x, factors).to(output.dtype)

        return self.layer.register_forward_hook(hook, with_kwargs=True)

    def answer(self, x: torch.Tensor, factors: Factors) -> torch.Tensor:
        """What the layer would give for x with these factors."""
        raise NotImplementedError

    # --- what flows through it ---

    def features_last(self, output: torch.Tensor) -> torch.Tensor:
        """Outputs, or their gradient, with examples first and features last."""
        return output

    def rows(self, tensor: torch.Tensor, side: str, pick: slice) -> torch.Tensor:
        """The picked tokens of an "input" or "output" as rows (tokens, in or out), or (count, tokens, in or out) of a stack.

        Tokens are numbered as in `features_last(output).flatten(0, -2)`.
        """
        rows = tensor.reshape(-1, tensor.shape[-1])
        return rows if pick.step == 1 and not pick.start and pick.stop is None else rows[pick]

    def tap(self, name: str, collector: Any) -> list[Any] | None:
        """Handles of hooks of the kind's own, which call `collector.add` or `add_to`; None for the ordinary ones on the layer.

        Args:
            collector: the `MomentCollector`, which knows the layer by this name.
        """
        return None

    def sums(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what a kind that takes no gradients sums; `see` adds to it, and `moments` makes moments of it."""
        raise NotImplementedError

    def see(self, sums: dict[str, torch.Tensor], given: torch.Tensor) -> None:
        """Add a training forward with this input."""
        raise NotImplementedError

    def moments(self, sums: dict[str, torch.Tensor], examples: float) -> LayerMoments | None:
        """Moments from the sums; None where nothing was seen. examples: loss terms of all batches."""
        raise NotImplementedError

    # --- what is tied to it ---

    def tied(self, model: nn.Module) -> list[nn.Module]:
        """Modules of the model whose weight is this layer's, or will be once it is loaded, and that follow it; others stay dense."""
        return []

    # --- what it costs ---

    def form(self) -> Form | None:
        """What is needed to time such a layer with other weights; None for a linear layer, whose size is enough."""
        return None

    def flops_per_parameter(self, output: torch.Tensor) -> int:
        """Multiplications and additions for each number of the weight (dense, or both factors) in the call that gave this output."""
        return 2 * self.features_last(output).flatten(0, -2).shape[0]
