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

import math
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.kind import Kind
from ..layers.kinds import dense_weight, kind_of, layer_at
from ..layers.parts import is_empty_between_uses, is_sharded, whole
from ..maths.factors import LayerMoments, Moments
from ..maths.tied import joined
from ..processes import Processes
from .batches import Batches, in_backward
from .eager import run_eagerly
from .samples import MOST_BYTES, Sample, Waiting, add_samples
from .taps import ForwardTap, NormTap, Tap

FEW = 0.25
"""A matrix of a stack that saw fewer tokens than this share of its smaller side has no moments: too few to tell what can go."""


class MomentCollector:
    """Sums of moments of many layers over the training steps between `start` and `stop`.

    Memory: 2 k^2 + n numbers a layer, k = min(m, n), in fp32: about the size of a transformer's weights (exactly 1.0x for
    BERT's shapes, 0.6x for Llama's). Time: of each micro-batch at most `max_tokens` tokens a layer enter, evenly spaced.

    Args:
        model: the module whose forward gets the batch (its `labels` tell how many loss terms a batch has).
        layers: name -> dense layer.
        max_tokens: tokens a layer and micro-batch.
        running: name -> the module that runs, where `layers` only describe them (FSDP1); None: they themselves.
        frozen: names of layers that are not trained and are to be gathered all the same.
        whole_flow: gives all features of a layer's "input" or "output" (or its gradient) where a process sees some alone
            (tensor parallelism); all processes call it for the same tensors in the same order.
        in_parts: whether weights are gone when backward has ended (sharded engines), so that each sample is added at once.
        far: names of layers whose sums are kept on the CPU (`places.far_layers`).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        max_tokens: int = 1024,
        running: Mapping[str, nn.Module] | None = None,
        whole_flow: Callable[[str, torch.Tensor, str], torch.Tensor] | None = None,
        frozen: Collection[str] = (),
        in_parts: bool = False,
        far: Collection[str] = (),
    ) -> None:
        self.model, self.layers, self.max_tokens = model, dict(layers), max_tokens
        self._running = dict(layers if running is None else running)
        # What is tied to a layer is gathered beside it, under a name that no module has.
        for name, layer in layers.items():
            for i, module in enumerate(kind_of(layer).tied(model)):
                self.layers[f"{name}/{i}"] = self._running[f"{name}/{i}"] = module
        self.whole_flow = whole_flow or (lambda name, tensor, what: tensor)
        self.frozen, self.far = frozenset(frozen), frozenset(far)
        self.sums: dict[str, dict[str, torch.Tensor]] = {}
        self.steps = 0
        self.batches = Batches()
        self.processes = 1
        """Over how many processes the batches are summed; see `reduce`."""
        self.has_norms = False
        self.latest: tuple[str, weakref.ref[torch.Tensor]] | None = None
        """The layer that ran last, and what it gave."""
        self._handles: list[Any] = []
        self._waiting = Waiting()
        self.together: bool | None = None
        """Whether samples of several layers are added together; None: on a GPU."""
        self._kinds: dict[str, Kind] = {}
        self._plain = {n for n, la in self._running.items() if type(la) is nn.Linear and not is_sharded(la.weight)}
        self._away: dict[str, torch.Tensor] = {}
        """NaN in the shapes of weights that ZeRO-3 has away; where their values count the tap has kept them."""
        self._last: tuple[torch.Tensor, tuple[Any, ...], torch.Tensor] | None = None
        self._on_gpu = any(layer.weight.device.type == "cuda" for layer in self._running.values())
        self._held_in_parts = in_parts or any(is_sharded(layer.weight) for layer in self._running.values())

    @property
    def running(self) -> bool:
        return bool(self._handles)

    def start(self) -> None:
        """Install the hooks. A compiled model runs eagerly until `stop`: hooks set after compilation are not seen by it."""
        if self.running:
            return
        run_eagerly(True)
        self._handles += self.batches.hooks(self.model, self._is_here)
        self._handles.append(self.model.register_forward_pre_hook(self._drop_waiting))
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                self.has_norms = True
                self._handles.append(module.register_forward_pre_hook(NormTap(self, module)))
        for name, layer in self._running.items():
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, (Tap, ForwardTap)):  # of a run that ended in an exception
                    del layer._forward_hooks[key]
            kind = kind_of(self.layers[name])
            if (own := kind.tap(name, self)) is not None:
                self._handles += own
                continue
            if not kind.takes_gradients:
                self._handles.append(layer.register_forward_hook(ForwardTap(self, name), with_kwargs=True))
                continue
            tap = Tap(self, name)
            self._handles.append(layer.register_forward_hook(tap, with_kwargs=True))
            if is_empty_between_uses(layer.weight):
                self._handles.append(layer.register_forward_pre_hook(tap.keep_weight))
                # Looked up here: in forward and backward ZeRO-3 gathers a weight that is only asked for, out of turn.
                self._away[name] = dense_weight(layer)
                self.sums_of(name)

    def stop(self) -> None:
        """Remove the hooks; the sums stay."""
        if self.running:
            run_eagerly(False)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._waiting.clear()

    def step(self) -> None:
        """Note that an optimizer step has ended."""
        self.steps += 1
        self._waiting.clear()
        self._last = None
        self.batches.step()

    def moments(self) -> dict[str, Moments]:
        """The moments of all layers that gathered something usable (finite, not empty), by name, in fp32 on their device.

        Of a stack of matrices a list, with None for a matrix that gathered nothing usable, or too little (`FEW`).
        """
        self.batches.settle()
        found = {name: self.moments_of(name) for name in self.layers if "/" not in name}
        return {name: moments for name, moments in found.items() if moments is not None}

    def moments_of(self, name: str) -> Moments | None:
        """The moments of one layer, in all that its weight is used for; None if it gathered nothing usable."""
        uses = [(n, self._moments_of(n)) for n in self.layers if n == name or n.startswith(f"{name}/")]
        if len(uses) == 1:
            return uses[0][1]
        vocabulary = [(m, not kind_of(self.layers[n]).is_vocabulary) for n, m in uses if isinstance(m, LayerMoments)]
        return joined(dense_weight(self.layers[name]), vocabulary) if vocabulary else None

    def _moments_of(self, name: str) -> Moments | None:
        s = self.sums.get(name)
        if s is None:
            return None
        # A loss divided by the number of accumulation steps is larger than what backward saw.
        seen = self.batches
        unscale = (seen.count / self.steps / self.processes if self.steps and seen.is_accumulated else 1.0) ** 2
        examples, layer = float(seen.total), self.layers[name]
        kind = kind_of(layer)
        if not kind.takes_gradients:
            return kind.moments(s, examples)
        norms = float(seen.norms)
        if norms > 0:
            unscale *= float(seen.squares) / norms
        if s["count"].ndim == 0:
            return _finish(layer, s, examples, unscale)
        enough = [tokens >= FEW * min(kind.size) for tokens in s["count"].tolist()]
        each = [
            _finish(layer, {k: v[i] for k, v in s.items()}, examples, unscale) if seen else None
            for i, seen in enumerate(enough)
        ]
        return each if any(moments is not None for moments in each) else None

    def mean_loss(self) -> float | None:
        """Mean of the losses that the model's forward returned meanwhile (per example); None if it returns none."""
        losses, count = self.batches.losses, self.batches.count
        return float(losses) / count if count and not isinstance(losses, float) else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All sums as a flat dictionary of tensors on the CPU (for safetensors)."""
        flat = {f"sums/{name}/{key}": v.cpu() for name, s in self.sums.items() for key, v in s.items()}
        seen = self.batches
        numbers = (seen.count, self.steps, seen.total, seen.norms, seen.squares, seen.losses)
        flat |= {k: torch.as_tensor(v, dtype=torch.float64).cpu() for k, v in zip(_SCALARS, numbers, strict=True)}
        flat["has_loss"] = torch.tensor(not isinstance(seen.losses, float))
        return flat

    def load_state_dict(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Reads what `state_dict` gave; layers that are no longer gathered are left out. Raises ValueError if it is not whole."""
        sums: dict[str, dict[str, torch.Tensor]] = {}
        known = {name for name, _ in (*self.model.named_modules(), *self.model.named_parameters())}
        for key, value in flat.items():
            if key.startswith("sums/"):
                name, _, part = key.removeprefix("sums/").rpartition("/")
                if name not in self.layers and name in known:
                    continue  # excluded since
                if name not in self.layers:
                    raise ValueError(f"the saved statistics hold {name!r}, which is no target layer of this model")
                sums.setdefault(name, {})[part] = value.to(self._place(name))
        for name, parts in sums.items():
            shapes, wanted = {k: tuple(v.shape) for k, v in parts.items()}, self._shapes(name)
            if shapes != wanted:
                raise ValueError(f"the saved statistics of {name} have the shapes {shapes}, and it needs {wanted}")
        wrong = [key for key in (*_SCALARS, "has_loss") if key not in flat or flat[key].numel() != 1]
        if wrong:
            raise ValueError(f"the saved statistics have no single number for {', '.join(wrong)}")
        self.sums = sums
        seen, self.steps = self.batches, int(flat["steps"])
        seen.count = int(flat["batches"])
        seen.total, seen.norms, seen.squares = (float(flat[k]) for k in ("terms_total", "norms", "squares"))
        device = dense_weight(next(iter(self.layers.values()))).device
        seen.losses = flat["losses"].to(device, torch.float32) if bool(flat["has_loss"]) else 0.0

    @torch.no_grad()
    def reduce(self, processes: Processes) -> None:
        """Sum over processes; afterwards the main one holds all and the others nothing, so that it can be done again."""
        if processes.size == 1:
            return
        self.processes = processes.size
        device = dense_weight(next(iter(self.layers.values()))).device
        for name in self.layers:
            for _, value in sorted(self.sums_of(name).items()):  # loaded sums are in another order than new ones
                here = value.to(device) if name in self.far else value  # where the processes can exchange it
                processes.sum_(here)
                value.copy_(here)
                if not processes.is_main:
                    value.zero_()
        seen = self.batches
        has_loss = not isinstance(seen.losses, float)
        mine = (seen.total, seen.norms, seen.squares, seen.losses, seen.count, has_loss)
        totals = torch.tensor([float(v) for v in mine], dtype=torch.float64, device=device)
        processes.sum_(totals)
        share = 1 if processes.is_main else 0
        total, norms, squares, losses, count, _ = (totals * share).tolist()
        seen.total, seen.norms, seen.squares, seen.count = total, norms, squares, int(count)
        if float(totals[-1]):
            seen.losses = torch.tensor(losses, dtype=torch.float32, device=device)

    def _is_here(self, model: nn.Module) -> bool:
        """Whether a forward is of the model itself, or of the replica of it that nn.DataParallel has put where it is."""
        if not getattr(model, "_is_replica", False):
            return True
        name, layer = next(iter(self.layers.items()))
        there = layer_at(model, name)
        return there is not None and there.weight.device == layer.weight.device

    def is_mine(self, name: str, module: nn.Module) -> bool:
        """Whether a module with our hook is the layer, or the replica of it that stands where it is."""
        layer = self._running.get(name)
        if module is layer:
            return True
        if layer is None or not getattr(module, "_is_replica", False):
            return False
        return type(module) is type(layer) and module.weight.device == layer.weight.device

    def sums_of(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.sums:
            device = self._place(name)
            self.sums[name] = {
                k: torch.zeros(size, dtype=torch.float32, device=device) for k, size in self._shapes(name).items()
            }
        return self.sums[name]

    def _place(self, name: str) -> torch.device:
        return torch.device("cpu") if name in self.far else dense_weight(self.layers[name]).device

    def weight_of(self, name: str) -> torch.Tensor:
        """The weight that a layer computes with now, (m, n)."""
        if (away := self._away.get(name)) is not None:
            return away
        parameter = cast(torch.Tensor, self._running[name].weight)
        if name in self._plain:
            return parameter.detach()
        if name not in self._kinds:
            self._kinds[name] = kind_of(self.layers[name])
        return self._kinds[name].matrix(whole(parameter))

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        kind = kind_of(self.layers[name])
        if not kind.takes_gradients:
            return kind.sums()
        (m, n), stack = kind.size, () if kind.count == 1 else (kind.count,)
        k = min(m, n)
        shapes = {"signal": (k, k), "metric": (k, k), "x": (n,), "count": (), "other": (), "y": (m,)}
        return {name: (*stack, *shape) for name, shape in shapes.items()}

    def add(
        self,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor | None,
        g: torch.Tensor,
        stride: int,
        weight: torch.Tensor,
        by: torch.Tensor | None = None,
    ) -> None:
        """Add a sample of tokens: inputs x (t, n), outputs y (t, m) where m <= n, output gradients g (t, m); weight (m, n).

        Of a stack each has its `count` in front. by: (t,), what the gradients are multiplied by.
        """
        if weight.ndim == 2:
            self._add_soon(self.sums_of(name), Sample(x, y, g, stride, weight, by))
            return
        for i, matrix in enumerate(weight):
            self.add_to(name, i, x[i], None if y is None else y[i], g[i], stride, matrix, by)

    def add_to(
        self,
        name: str,
        at: int,
        x: torch.Tensor,
        y: torch.Tensor | None,
        g: torch.Tensor,
        stride: int,
        weight: torch.Tensor,
        by: torch.Tensor | None = None,
    ) -> None:
        """As `add`, for the matrix numbered `at` of a stack, which sees tokens of its own."""
        sums = {k: v[at] for k, v in self.sums_of(name).items()}
        self._add_soon(sums, Sample(x, y, g, stride, weight, by))

    @property
    def spares_launches(self) -> bool:
        """Whether samples of several layers are added together, and outputs worked out from inputs."""
        return not self._held_in_parts and (self._on_gpu if self.together is None else self.together)

    def sample_of(self, name: str, kind: Kind, given: torch.Tensor, pick: slice) -> torch.Tensor:
        """A copy of the picked tokens of a layer's input; one for all layers that read one tensor."""
        key = given._version, kind.is_linear, pick.start, pick.step
        if self._last is None or self._last[0] is not given or self._last[1] != key or not kind.is_linear:
            x = self.whole_flow(name, kind.rows(given.detach(), "input", pick).clone(), "input")
            self._last = given, key, x
        return self._last[2]

    def _add_soon(self, sums: dict[str, torch.Tensor], sample: Sample) -> None:
        """At once; on a GPU, where each launch counts, with others: when there are several, or backward ends."""
        if not self.spares_launches or not in_backward():
            self._add([(sums, sample)])
            return
        if not self._waiting:
            # Not later: the optimizer's step would change the weights.
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)
        self._waiting.add(sums, sample)
        if self._waiting.nbytes > MOST_BYTES:
            self.flush()

    def _drop_waiting(self, *_: Any) -> None:
        """A forward begins: what still waits is of a backward that an exception has ended."""
        if not in_backward():
            self._waiting.clear()

    def flush(self) -> None:
        """Add all samples that wait."""
        for same in self._waiting.take():
            self._add(same)

    def _add(self, same: list[tuple[dict[str, torch.Tensor], Sample]]) -> None:
        scale = self.batches.terms / self.batches.loss_scale
        add_samples([sums for sums, _ in same], [sample for _, sample in same], scale)


_SCALARS = ("batches", "steps", "terms_total", "norms", "squares", "losses")


def _finish(layer: nn.Module, s: dict[str, torch.Tensor], examples: float, unscale: float) -> LayerMoments | None:
    """The moments of one matrix from its sums; None where they are of nothing, or not finite."""
    # The device is asked once for each layer.
    largest = dict(zip(s, torch.stack([value.abs().amax() for value in s.values()]).tolist(), strict=True))
    count, other = largest["count"], largest["other"]
    if count <= 0 or examples <= 0 or not all(map(math.isfinite, largest.values())):
        return None
    m, n = kind_of(layer).size
    has_bias = kind_of(layer).takes_mean
    mean = s["x"] / count
    if m <= n:
        signal, metric = s["signal"] / count, s["metric"] * (unscale / count)
        if has_bias:
            mean_y = s["y"] / count
            signal = signal - torch.outer(mean_y, mean_y)
        other = other / (count * n) - (float(mean.square().mean()) if has_bias else 0.0)
    else:
        signal, metric = s["signal"] * (unscale / count), s["metric"] / count
        if has_bias:
            metric = metric - torch.outer(mean, mean)
        other = other * unscale / (count * m)
    return LayerMoments(signal, metric, max(other, 0.0), mean if has_bias else None, tokens=count / examples)
