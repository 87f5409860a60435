"""Tables of tokens: nn.Embedding as a linear map of one-hot vectors, and what is tied to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from ..maths.factors import Factors
from .dense import said_of_more
from .embedding import LowRankEmbedding, LowRankOutput, scale_of, shell_of
from .kind import Kind
from .parts import is_sharded, shape_of


class EmbeddingKind(Kind):
    """nn.Embedding, (tokens, width): its weight is the matrix transposed, and so is the factor `down`.

    A subclass counts that says by what its rows are multiplied, if that is all it does: it is tried.
    """

    dense = nn.Embedding
    low_rank = LowRankEmbedding
    label = "nn.Embedding"
    is_vocabulary = True

    @classmethod
    def takes(cls, module: nn.Module | None) -> bool:
        return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))

    def why_dense(self) -> str:
        table = cast(nn.Embedding, self.layer)
        if table.num_embeddings < table.embedding_dim:
            return "it has fewer rows than columns"
        if table.sparse:
            return "its gradients are sparse, and those of a low-rank table cannot be: build it with sparse=False"
        if table.max_norm is not None or table.scale_grad_by_freq:
            return "max_norm and scale_grad_by_freq change whole rows of a table, which a low-rank one does not have"
        if not _gives_scaled_rows(table):
            return f"{type(table).__name__} gives more than its rows times a scale"
        return said_of_more(table, own=("weight", "embed_scale"))

    def flops_per_parameter(self, output: torch.Tensor) -> int:
        return 0  # rows are looked up

    def matrix(self, tensor: torch.Tensor, part: str = "dense") -> torch.Tensor:
        return tensor if part == "up" else tensor.mT

    def tensor(self, matrix: torch.Tensor, part: str, shape: Sequence[int]) -> torch.Tensor:
        return matrix if part == "up" else matrix.mT

    def dense_shape(self, down: torch.Tensor, up: torch.Tensor) -> tuple[int, ...]:
        return (len(down), len(up))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        table = cast("nn.Embedding | LowRankEmbedding", self.layer)
        tokens, width = table.num_embeddings, table.embedding_dim
        return {"dense": (tokens, width), "down": (tokens, rank), "up": (width, rank)}

    def stand_in(self, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0) -> LowRankEmbedding:
        table, weight = cast(nn.Embedding, self.layer), cast(nn.Parameter, self.layer.weight)
        rank = down.shape[0] if down is not None else rank
        tokens, width = self.shapes(1)["dense"]
        layer = LowRankEmbedding(tokens, width, rank, table.padding_idx, scale_of(table), device="meta")
        layer.down.weight = self.filled("down", down, rank, weight)
        layer.up.weight = self.filled("up", up, rank, weight)
        layer.shell = (shell_of(table),)
        return layer.train(table.training)

    def answer(self, x: torch.Tensor, factors: Factors) -> torch.Tensor:
        like = cast(torch.Tensor, self.layer.weight)
        rows = functional.embedding(x, factors.down.mT.to(like))
        return functional.linear(rows, factors.up.to(like)) * scale_of(cast(nn.Embedding, self.layer))

    # --- what flows through it ---

    def rows(self, tensor: torch.Tensor, side: str, pick: slice) -> torch.Tensor:
        """Of the input the numbers of the picked tokens, which stand for one-hot rows."""
        return tensor.reshape(-1)[pick] if side == "input" else super().rows(tensor, side, pick)

    # --- what is tied to it ---

    def tied(self, model: nn.Module) -> list[nn.Module]:
        """Output layers, and other tables of the same scale and padding."""
        return [module for module in users(model, self.layer) if not why_not_tied(self.layer, module)]


def users(model: nn.Module, table: nn.Module) -> list[nn.Module]:
    """Modules of the model, each once, whose weight is the table's, or will be once it is loaded; the table aside."""
    weight, modules = table._parameters.get("weight"), dict(model.named_modules(remove_duplicate=False))
    named = {n for group in tied_groups(model) if any(modules.get(n) is table for n in group) for n in group}
    found = [modules[name] for name in sorted(named) if name in modules]
    found += [m for m in modules.values() if weight is not None and m._parameters.get("weight") is weight]
    return list({id(m): m for m in found if m is not table}.values())


def follower_names(model: nn.Module) -> set[str]:
    """Names of modules that follow a table: they are what it is, and have no structure of their own."""
    sources = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    found: set[str] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in reversed(modules.items())}
    tables = [name for name, module in modules.items() if EmbeddingKind.takes(module)]
    for name in sorted(tables, key=lambda name: f"{name}.weight" not in sources):
        if name not in found:
            found |= {names[id(module)] for module in EmbeddingKind(modules[name]).tied(model)}
    return found | {name for name, module in modules.items() if isinstance(module, LowRankOutput)}


def tied_groups(model: nn.Module) -> list[set[str]]:
    """Names of modules whose weights transformers ties, a set for each weight."""
    groups: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            one = groups.setdefault(source, {source.removesuffix(".weight")})
            one.add(target.removesuffix(".weight"))
    return list(groups.values())


def with_tied(model: nn.Module, new: Mapping[int, tuple[nn.Module, Any]]) -> dict[int, Any]:
    """Exchanges by id, and those of the modules tied to the ones that are exchanged.

    Args:
        new: id of what is registered in the model -> (the layer, dense or low rank, what takes its place).
    """
    found = {key: replacement for key, (_, replacement) in new.items()}
    for old, replacement in new.values():
        if isinstance(old, LowRankEmbedding):
            for output in (m for m in model.modules() if isinstance(m, LowRankOutput) and m.down is old.down):
                low_rank = isinstance(replacement, LowRankEmbedding)
                found[id(output)] = (
                    LowRankOutput(replacement, output.bias) if low_rank else output.to_dense(replacement)
                )
        elif isinstance(replacement, LowRankEmbedding):
            for other in EmbeddingKind(old).tied(model):
                found[id(other)] = tied_to(replacement, other)
    return found


def tied_to(embedding: LowRankEmbedding, module: nn.Module) -> nn.Module:
    """What stands for a module that is tied to the dense table of this layer."""
    if isinstance(module, nn.Embedding):
        return embedding
    return _keep_mode(LowRankOutput(embedding, cast("nn.Parameter | None", module.bias)), module)


def why_not_tied(table: nn.Module, module: nn.Module) -> str:
    """Why a module that is tied to a table cannot follow it; "" where it can."""
    table = cast(nn.Embedding, table)
    if type(module) is nn.Linear:
        return ""
    if not EmbeddingKind.takes(module):
        return f"a {type(module).__name__} is tied to it"
    other = cast(nn.Embedding, module)
    if (scale_of(other), other.padding_idx) != (scale_of(table), table.padding_idx):
        return "a table of another scale or padding is tied to it"
    return EmbeddingKind(module).why_dense()


def _keep_mode(new: nn.Module, old: nn.Module) -> nn.Module:
    return new.train(old.training)


def _gives_scaled_rows(table: nn.Embedding) -> bool:
    """Whether a table of any subclass computes what nn.Embedding does, times a scale."""
    weight = table.weight
    if set(table._parameters) != {"weight"} or list(table.children()):  # T5Gemma 2 has a row apart for one token
        return False
    if type(table) is nn.Embedding or weight.is_meta or weight.shape != shape_of(weight) or is_sharded(weight):
        return True
    if type(table).forward is nn.Embedding.forward:
        return True
    ids = torch.arange(min(8, table.num_embeddings), device=weight.device)[None]
    with torch.no_grad():
        given, rows = table(ids).float(), functional.embedding(ids, weight).float() * scale_of(table)
    return torch.allclose(given, rows, rtol=1e-2, atol=1e-6)
