"""Gather, inside ordinary training steps, what flows through each layer: the moments that `factorization` works on.

A forward hook on each target keeps a sample of the layer's tokens; a hook on the output's gradient adds them to the sums.
Tokens whose output gradient is exactly zero are left out: padding in an encoder (nothing reads it), positions without a
label after the last block, all but [CLS] in the last block of a classifier. So no attention mask has to be found, and
encoder-decoder models, images and causal models need no case of their own.

Gradients of the training loss say little of examples that the model gets right: with p the probability of the label they are
in proportion to 1 - p, and their squares to (1 - p)^2, where labels drawn from the model itself, the Fisher information of
K-FAC (Martens and Grosse, arXiv 1503.05671), would give p (1 - p). So the squares of an example are divided by the norm of its
gradient at the first layer that backward reaches, and all together multiplied by what keeps their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..layers.dense import dense_origin, dense_weight
from ..layers.parts import is_empty_between_uses, whole
from ..maths.factors import LayerMoments
from ..processes import Processes


class MomentCollector:
    """Sums of moments of many layers over the training steps between `start` and `stop`.

    Memory: 2 k^2 + n numbers a layer, k = min(m, n), in fp32: about the size of a transformer's weights (exactly 1.0x for
    BERT's shapes, 0.6x for Llama's). Time: of each micro-batch at most `max_tokens` tokens a layer enter, evenly spaced.

    Args:
        model: the module whose forward gets the batch (its `labels` tell how many loss terms a batch has).
        layers: name -> dense layer.
        max_tokens: tokens a layer and micro-batch.
        running: name -> the module that runs, where `layers` only describe them (FSDP1); None: they themselves.
        whole_flow: gives all features of a layer's "input" or "output" (or its gradient) where a process sees some alone
            (tensor parallelism); all processes call it for the same tensors in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        max_tokens: int = 1024,
        running: Mapping[str, nn.Module] | None = None,
        whole_flow: Callable[[str, torch.Tensor, str], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.layers, self.max_tokens = model, dict(layers), max_tokens
        self._running = dict(layers if running is None else running)
        self.whole_flow = whole_flow or (lambda name, tensor, what: tensor)
        self.sums: dict[str, dict[str, torch.Tensor]] = {}
        self.batches = 0
        self.steps = 0
        self.loss_scale = 1.0
        """Factor on the loss at backward (a GradScaler's scale), set before each step; undone here."""
        self.loss_factor = 1.0
        """Factor on the loss at backward where the batch's `num_items_in_batch` is given: with average_tokens_across_devices
        the Trainer counts items over all processes and multiplies each one's loss by their number."""
        self.replicas = 1
        """Over how many devices of this process nn.DataParallel splits a batch. Those of the replica that stands where the
        layers are are gathered; the loss is the mean over all."""
        self.processes = 1
        """Over how many `batches` are summed; see `reduce`."""
        self.terms_total: torch.Tensor | float = 0.0
        self.norms: torch.Tensor | float = 0.0
        """Sum over examples of the norm of an example's gradient, and in `squares` of its square."""
        self.squares: torch.Tensor | float = 0.0
        self._weights: dict[int, torch.Tensor] = {}
        self.losses: torch.Tensor | float = 0.0
        self._terms: torch.Tensor | float = 1.0
        self._rows = 1
        self._accumulated = True
        self._handles: list[Any] = []

    @property
    def running(self) -> bool:
        return bool(self._handles)

    def start(self) -> None:
        """Install the hooks. A compiled model runs eagerly until `stop`: hooks set after compilation are not seen by it."""
        if self.running:
            return
        torch.compiler.set_stance("force_eager")
        self._handles.append(self.model.register_forward_pre_hook(self._count_terms, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._note_loss))
        for name, layer in self._running.items():
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, _Tap):  # of a run that ended in an exception
                    del layer._forward_hooks[key]
            tap = _Tap(self, name)
            self._handles.append(layer.register_forward_hook(tap))
            if is_empty_between_uses(layer.weight):
                self._handles.append(layer.register_forward_pre_hook(tap.keep_weight))

    def stop(self) -> None:
        """Remove the hooks; the sums stay."""
        if self.running:
            torch.compiler.set_stance("default")
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def step(self) -> None:
        """Note that an optimizer step has ended."""
        self.steps += 1
        self._weights.clear()

    def moments(self) -> dict[str, LayerMoments]:
        """The moments of all layers that gathered something usable (finite, not empty), by name, in fp32 on their device."""
        found = {name: self.moments_of(name) for name in self.sums}
        return {name: moments for name, moments in found.items() if moments is not None}

    def moments_of(self, name: str) -> LayerMoments | None:
        """The moments of one layer; None if it gathered nothing usable."""
        s = self.sums.get(name)
        if s is None:
            return None
        # A loss divided by the number of accumulation steps is larger than what backward saw.
        unscale = (self.batches / self.steps / self.processes if self.steps and self._accumulated else 1.0) ** 2
        examples, count = float(self.terms_total), float(s["count"])
        if count <= 0 or examples <= 0 or not all(bool(torch.isfinite(v).all()) for v in s.values()):
            return None
        norms = float(self.norms)
        if norms > 0:
            unscale *= float(self.squares) / norms
        return _finish(self.layers[name], s, count, examples, unscale)

    def mean_loss(self) -> float | None:
        """Mean of the losses that the model's forward returned meanwhile (per example); None if it returns none."""
        return float(self.losses) / self.batches if self.batches and not isinstance(self.losses, float) else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All sums as a flat dictionary of tensors on the CPU (for safetensors)."""
        flat = {f"sums/{name}/{key}": v.cpu() for name, s in self.sums.items() for key, v in s.items()}
        flat |= {key: torch.as_tensor(getattr(self, key), dtype=torch.float64).cpu() for key in _SCALARS}
        flat["has_loss"] = torch.tensor(not isinstance(self.losses, float))
        return flat

    def load_state_dict(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Reads what `state_dict` gave. Raises ValueError if it belongs to other layers, or is not whole."""
        sums: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in flat.items():
            if key.startswith("sums/"):
                name, _, part = key.removeprefix("sums/").rpartition("/")
                if name not in self.layers:
                    raise ValueError(f"the saved statistics hold {name!r}, which is no target layer of this model")
                sums.setdefault(name, {})[part] = value.to(dense_weight(self.layers[name]).device)
        for name, parts in sums.items():
            shapes, wanted = {k: tuple(v.shape) for k, v in parts.items()}, self._shapes(name)
            if shapes != wanted:
                raise ValueError(f"the saved statistics of {name} have the shapes {shapes}, and it needs {wanted}")
        wrong = [key for key in (*_SCALARS, "has_loss") if key not in flat or flat[key].numel() != 1]
        if wrong:
            raise ValueError(f"the saved statistics have no single number for {', '.join(wrong)}")
        self.sums = sums
        self.batches, self.steps = int(flat["batches"]), int(flat["steps"])
        self.terms_total, self.norms, self.squares = (float(flat[k]) for k in ("terms_total", "norms", "squares"))
        device = dense_weight(next(iter(self.layers.values()))).device
        self.losses = flat["losses"].to(device, torch.float32) if bool(flat["has_loss"]) else 0.0

    @torch.no_grad()
    def reduce(self, processes: Processes) -> None:
        """Sum over processes; afterwards the main one holds all and the others nothing, so that it can be done again."""
        if processes.size == 1:
            return
        self.processes = processes.size
        device = dense_weight(next(iter(self.layers.values()))).device
        for name in self.layers:
            for _, value in sorted(self._sums_of(name).items()):  # loaded sums are in another order than new ones
                processes.sum_(value)
                if not processes.is_main:
                    value.zero_()
        has_loss = not isinstance(self.losses, float)
        mine = (self.terms_total, self.norms, self.squares, self.losses, self.batches, has_loss)
        totals = torch.tensor([float(v) for v in mine], dtype=torch.float64, device=device)
        processes.sum_(totals)
        terms, norms, squares, losses, batches, with_loss = totals.tolist()
        share = 1 if processes.is_main else 0
        self.terms_total, self.norms, self.squares = terms * share, norms * share, squares * share
        self.batches = int(batches) * share
        if with_loss:
            self.losses = torch.tensor(losses * share, dtype=torch.float32, device=device)

    def _count_terms(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """How many terms the batch's loss is a mean of: labels that count, or rows; or the Trainer's number of items."""
        if not torch.is_grad_enabled() or not self._is_here(module):
            return
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        tensors = [t for t in (labels, *args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim]
        self._rows = len(tensors[0]) if tensors else 1
        terms: torch.Tensor | float = self._rows
        if isinstance(labels, torch.Tensor) and labels.ndim >= 2 and not labels.is_floating_point():
            terms = labels.ne(-100).sum()
        self.batches += 1
        self.terms_total = self.terms_total + terms
        # The Trainer's number of items spans all micro-batches of a step, and it does not divide the loss by their number.
        # Losses over tokens are sums over that number; losses over rows take their own mean all the same.
        self._accumulated = items is None
        over_tokens = isinstance(labels, torch.Tensor) and labels.ndim >= 2
        if isinstance(items, torch.Tensor):
            items = items.flatten()[0]  # nn.DataParallel gives each replica a table of one
        self._terms = (items if items is not None and over_tokens else terms) * self.replicas
        if items is not None:
            self._terms = self._terms / self.loss_factor

    def _note_loss(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled() and self._is_here(module):
            loss = output.get("loss") if hasattr(output, "get") else None
            if isinstance(loss, torch.Tensor) and loss.ndim == 0:
                self.losses = self.losses + loss.detach().float()

    def _is_here(self, model: nn.Module) -> bool:
        """Whether a forward is of the model itself, or of the replica of it that nn.DataParallel has put where it is."""
        if not getattr(model, "_is_replica", False):
            return True
        name, layer = next(iter(self.layers.items()))
        return model.get_submodule(name).weight.device == layer.weight.device

    def is_mine(self, name: str, module: nn.Module) -> bool:
        """Whether a module with our hook is the layer, or the replica of it that stands where it is."""
        layer = self._running.get(name)
        if layer is None or not getattr(module, "_is_replica", False):
            return module is layer
        return type(module) is type(layer) and module.weight.device == layer.weight.device

    def _sums_of(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.sums:
            device = dense_weight(self.layers[name]).device
            self.sums[name] = {
                k: torch.zeros(size, dtype=torch.float32, device=device) for k, size in self._shapes(name).items()
            }
        return self.sums[name]

    def weight_of(self, name: str) -> torch.Tensor:
        """The weight that a layer computes with now, (m, n)."""
        weight = whole(cast(torch.Tensor, self._running[name].weight))
        return weight.T if dense_origin(self.layers[name]) == "Conv1D" else weight

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        m, n = dense_weight(self.layers[name]).shape
        k = min(m, n)
        return {"signal": (k, k), "metric": (k, k), "x": (n,), "count": (), "other": (), "y": (m,)}

    @torch.no_grad()
    def factors(self, batch: int, grad: torch.Tensor, rows: int) -> torch.Tensor:
        """By what each token's output gradient is multiplied: one over the square root of its example's norm, (tokens,) in fp32.

        The first layer that backward reaches in a batch has the norms. Examples may be in parts (windows of images, tokens
        one below the other) that follow one another; where that cannot be, as with experts, all get one number for the mean.

        Args:
            batch: number of the micro-batch. grad: (examples or parts of them, ..., m). rows: examples of the batch.
        """
        tokens = grad.numel() // grad.shape[-1]
        weights = self._weights.get(batch)
        if weights is None and tokens:
            examples = grad.reshape(rows, -1) if rows and len(grad) % rows == 0 else grad.flatten(1)
            norms = torch.linalg.vector_norm(examples, dim=1, dtype=torch.float32) * (self._terms / self.loss_scale)
            norms = torch.where(torch.isfinite(norms), norms, 0.0)
            self._weights[batch] = weights = torch.where(norms > 0, norms, torch.inf).rsqrt()
            self.norms, self.squares = self.norms + norms.sum(), self.squares + norms.square().sum()
        if weights is None or not tokens:
            return torch.ones(tokens, device=grad.device)
        if len(grad) % len(weights):
            norms = torch.where(weights > 0, weights.pow(-2), 0.0)
            mean = (norms.sum() / norms.square().sum()).sqrt().nan_to_num()
            return mean.expand(tokens)
        return weights.repeat_interleave(tokens // len(weights))

    @torch.no_grad()
    def add(
        self, name: str, x: torch.Tensor, y: torch.Tensor | None, g: torch.Tensor, stride: int, weight: torch.Tensor
    ) -> None:
        """Add a sample of tokens: inputs x (t, n), outputs y (t, m) where m <= n, output gradients g (t, m); weight (m, n)."""
        s = self._sums_of(name)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            g = g.float() * (self._terms / self.loss_scale)
            finite = torch.isfinite(g).all()  # an overflow step under fp16 is left out whole, without asking the device
            g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) * finite
            used = (g != 0).any(-1, keepdim=True)
            x = torch.where(used, x.float(), 0.0)
            s["x"].add_(x.sum(0), alpha=stride)
            s["count"].add_(used.sum(), alpha=stride)
            if y is not None:  # m <= n: covariance of the outputs, moment of the output gradients
                y = torch.where(used, y.float(), 0.0)
                s["signal"].addmm_(y.mT, y, alpha=stride)
                s["metric"].addmm_(g.mT, g, alpha=stride)
                s["y"].add_(y.sum(0), alpha=stride)
                s["other"].add_(x.square().sum(), alpha=stride)
            else:  # m > n: moment of the input gradients, covariance of the inputs
                h = g @ weight.float()
                s["signal"].addmm_(h.mT, h, alpha=stride)
                s["metric"].addmm_(x.mT, x, alpha=stride)
                s["other"].add_(g.square().sum(), alpha=stride)


_SCALARS = ("batches", "steps", "terms_total", "norms", "squares", "losses")


def steps_in(flat: Mapping[str, torch.Tensor]) -> int:
    """The steps that saved statistics were gathered in. Raises ValueError where they do not say it."""
    if "steps" not in flat or flat["steps"].numel() != 1:
        raise ValueError("the saved statistics do not say in how many steps they were gathered")
    return int(flat["steps"])


class _Tap:
    """Forward hook of one layer: samples its tokens now and adds them to the sums when the gradient arrives."""

    def __init__(self, collector: MomentCollector, name: str) -> None:
        self.collector, self.name = collector, name
        self._weight: torch.Tensor | None = None

    def keep_weight(self, module: nn.Module, args: tuple) -> None:
        """Before the forward, under ZeRO-3: it is whole only now, and the gradient comes before it is gathered again."""
        m, n = dense_weight(module).shape
        if torch.is_grad_enabled() and m > n:
            self._weight = dense_weight(module)

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not self.collector.is_mine(self.name, module):
            return  # a pair shares the hook table of the layer that it replaced
        if not (torch.is_grad_enabled() and isinstance(output, torch.Tensor) and output.requires_grad and args):
            return
        collector, name = self.collector, self.name
        m, n = dense_weight(collector.layers[name]).shape
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        stride = -(-len(x) // collector.max_tokens) if len(x) else 1
        first = collector.batches % stride  # other tokens in each batch, and no random number drawn
        x = collector.whole_flow(name, x[first::stride].clone() if stride > 1 else x, "input")
        y = None
        if m <= n:
            y = output.detach().reshape(-1, output.shape[-1])[first::stride]
            y = collector.whole_flow(name, y.clone() if stride > 1 else y, "output")

        batch, rows = collector.batches, collector._rows
        kept, self._weight = self._weight, None

        def arrived(grad: torch.Tensor) -> None:
            grad = collector.whole_flow(name, grad.detach(), "output")
            by = collector.factors(batch, grad, rows)[first::stride, None]
            collector.add(
                name,
                x,
                y,
                grad.reshape(-1, m)[first::stride].float() * by,
                stride,
                collector.weight_of(name) if kept is None else kept,
            )

        output.register_hook(arrived)


def _finish(
    layer: nn.Module, s: dict[str, torch.Tensor], count: float, examples: float, unscale: float
) -> LayerMoments:
    m, n = dense_weight(layer).shape
    has_bias = layer.bias is not None
    mean = s["x"] / count
    if m <= n:
        signal, metric = s["signal"] / count, s["metric"] * (unscale / count)
        if has_bias:
            mean_y = s["y"] / count
            signal = signal - torch.outer(mean_y, mean_y)
        other = float(s["other"]) / (count * n) - (float(mean.square().mean()) if has_bias else 0.0)
    else:
        signal, metric = s["signal"] * (unscale / count), s["metric"] / count
        if has_bias:
            metric = metric - torch.outer(mean, mean)
        other = float(s["other"]) * unscale / (count * m)
    return LayerMoments(signal, metric, max(other, 0.0), mean if has_bias else None, tokens=count / examples)
