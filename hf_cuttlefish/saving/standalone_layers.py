"""The low-rank layers of `modeling_low_rank.py`, which is one file in a folder: this text stands in it where it imports it."""

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel


class LowRankLinear(nn.Module):
    """y = up(down(x)) + bias, in the place of an `nn.Linear` or a `Conv1D`."""

    def __init__(self, dense, rank):
        super().__init__()
        weight = dense.weight
        self.origin = type(dense).__name__
        out_features, in_features = weight.shape if self.origin == "Linear" else weight.shape[::-1]
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.up = nn.Linear(rank, out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.up.bias = dense.bias
        self.down._is_hf_initialized = self.up._is_hf_initialized = True  # by nn.Linear, or by the file
        vars(self.down)["bias"] = torch.empty(0)  # until `_settled`: OneFormer and xLSTM fill it without asking

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        return self.up(self.down(x))

    @property
    def weight(self):
        """The product; T5 asks for its dtype in each forward, so it is multiplied out only when its values are used."""
        if torch.compiler.is_compiling():
            return self.up.weight @ self.down.weight
        return _Product(self.up.weight, self.down.weight)

    @property
    def bias(self):
        return self.up.bias


class LowRankConv2d(nn.Module):
    """up(down(x)), in the place of an `nn.Conv2d`: its kernel into `rank` filters for each group, then 1 x 1."""

    def __init__(self, dense, rank):
        super().__init__()
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            setattr(self, name, getattr(dense, name))
        self.rank, middle = rank, dense.groups * rank
        made = {"bias": False, "groups": dense.groups, "device": dense.weight.device, "dtype": dense.weight.dtype}
        geometry = (dense.kernel_size, dense.stride, dense.padding, dense.dilation)
        self.down = nn.Conv2d(dense.in_channels, middle, *geometry, padding_mode=dense.padding_mode, **made)
        self.up = nn.Conv2d(middle, dense.out_channels, 1, **made)
        self.up.bias = dense.bias
        self.down._is_hf_initialized = self.up._is_hf_initialized = True

    def forward(self, x):
        return self.up(self.down(x))


class _Product(torch.Tensor):
    """A dtype, a shape and a device; up @ down in any operation."""

    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, up, down):
        shape = (up.shape[0], down.shape[1])
        product = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=up.dtype, device=up.device)
        product._factors = (up, down)
        return product

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _NEED_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        multiplied = torch.utils._pytree.tree_map_only(
            cls, lambda p: p._factors[0] @ p._factors[1], (args, kwargs or {})
        )
        return func(*multiplied[0], **multiplied[1])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls.__torch_function__(func, types, args, kwargs)


_NEED_NO_VALUES = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "is_meta")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "element_size")),
}


class LowRankEmbedding(nn.Embedding):
    """y = scale * up(down[ids]), in the place of an `nn.Embedding`; `weight` is the narrow table of `down`."""

    def __init__(self, dense, rank):
        nn.Module.__init__(self)
        weight, made = dense.weight, {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self.rank, (tokens, self.embedding_dim) = rank, weight.shape
        self.scale = getattr(dense, "scalar_embed_scale", getattr(dense, "embed_scale", 1.0))
        self.down = nn.Embedding(tokens, rank, dense.padding_idx, **made)
        self.up = nn.Linear(rank, self.embedding_dim, bias=False, **made)
        self.down._is_hf_initialized = self.up._is_hf_initialized = True

    def forward(self, input):
        """(...) token numbers -> (..., embedding_dim)."""
        return self.up(self.down(input)) * self.scale

    @property
    def weight(self):
        return self.down.weight

    @property
    def num_embeddings(self):
        return self.down.num_embeddings

    @num_embeddings.setter
    def num_embeddings(self, value):
        self.down.num_embeddings = value

    @property
    def padding_idx(self):
        return self.down.padding_idx

    @padding_idx.setter
    def padding_idx(self, value):
        self.down.padding_idx = value


class LowRankOutput(nn.Linear):
    """logits = down (up^T h) + bias: an output layer that is tied to a `LowRankEmbedding`."""

    def __init__(self, embedding, bias):
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.down, self.up = embedding.down, embedding.up
        self.register_parameter("bias", bias)

    def forward(self, input):
        """(..., embedding_dim) -> (..., tokens)."""
        return nn.functional.linear(nn.functional.linear(input, self.up.weight.mT), self.down.weight, self.bias)

    @property
    def weight(self):
        return self.down.weight


_KINDS = {nn.Linear: LowRankLinear, transformers.pytorch_utils.Conv1D: LowRankLinear, nn.Conv2d: LowRankConv2d}
PAIRS = (LowRankLinear, LowRankConv2d, LowRankEmbedding)


def is_dense(module):
    """Whether there is a low-rank layer for it."""
    return type(module) in _KINDS or _is_table(module)


def _is_table(module):
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))


def largest_rank(module):
    """Of a pair in the place of a dense layer."""
    rows, groups = len(module.weight), getattr(module, "groups", 1)
    return min(rows // groups, module.weight.numel() // rows)


def exchange(model, ranks):
    """Put low-rank layers in the places of the named ones, and of what is tied to a table."""
    modules, new = dict(model.named_modules(remove_duplicate=False)), {}
    for name, rank in ranks.items():
        dense = modules[name]
        if not _is_table(dense):
            new[id(dense)] = _KINDS[type(dense)](dense, rank)
            continue
        new[id(dense)] = low = LowRankEmbedding(dense, rank)
        keys = [
            (t.removesuffix(".weight"), s.removesuffix(".weight"))
            for t, s in _ties(model).items()
            if t.endswith(".weight")
        ]
        sources = {s for t, s in keys if name in (t, s)}
        for tied in {one for pair in keys if pair[1] in sources for one in pair} - {name}:
            if isinstance(modules.get(tied), nn.Embedding):
                new[id(modules[tied])] = low
            elif type(modules.get(tied)) is nn.Linear:
                new[id(modules[tied])] = LowRankOutput(low, modules[tied].bias)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            parent._modules[name] = new.get(id(child), child)
        for name, value in list(vars(parent).items()):
            # MaskFormer runs its layers from a plain list.
            if type(value) in (list, tuple) and any(id(child) in new for child in value):
                vars(parent)[name] = type(value)([new.get(id(child), child) for child in value])
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        for note in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(part, note, None)
            if isinstance(keys, dict) and (renamed := _renamed(part, keys)) != keys:
                setattr(part, note, renamed)


def _ties(model):
    return getattr(model, "all_tied_weights_keys", None) or {}


def _renamed(model, keys):
    low, found = _vocabulary(model), {}
    for target, source in keys.items():
        if target.removesuffix(".weight") not in low:
            found[target] = source
            continue
        for child in ("down", "up"):
            found[target.replace(".weight", f".{child}.weight")] = source.replace(".weight", f".{child}.weight")
    return found


def _vocabulary(model):
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if isinstance(module, (LowRankEmbedding, LowRankOutput))}


def without_ties(model, plan):
    """Rules of tensor parallelism but for a low-rank vocabulary, which all processes hold whole."""
    low = _vocabulary(model)
    return {name: style for name, style in plan.items() if name not in low}


def resized_head(resize, old, tokens, *args, **kwargs):
    """An output layer for another number of tokens: of a low-rank one the factor that has them."""
    if tokens is not None and isinstance(old, LowRankLinear):
        old.up = resize(old.up, tokens, *args, **kwargs)
        old.out_features = tokens
        return old
    if tokens is not None and isinstance(old, LowRankOutput):
        old.out_features = tokens
        if old.bias is not None:
            old.bias.data = nn.functional.pad(old.bias.data, (0, tokens - len(old.bias)))
        return old
    return resize(old, tokens, *args, **kwargs)
