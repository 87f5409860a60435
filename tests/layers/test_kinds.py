"""Kinds of layers: the table, and what a new kind has to answer, on a stack of matrices that is one parameter of a module."""

import copy

import pytest
import torch
from torch import nn

from hf_cuttlefish import CuttlefishConfig, estimate_ranks, factorize, merge
from hf_cuttlefish.layers import kinds
from hf_cuttlefish.layers.kind import Kind
from hf_cuttlefish.layers.kinds import dense_weight, find_layers, kind_of, labels, layer_at
from hf_cuttlefish.layers.low_rank import LowRankLayer
from hf_cuttlefish.maths.factors import LayerMoments, cut, decompose, rough_cut
from hf_cuttlefish.maths.projection import Layout, project
from hf_cuttlefish.measure.tracker import StableRankTracker
from hf_cuttlefish.patch.structure import NoteStructure

COUNT, OUT, IN = 3, 16, 24


class Shelf(nn.Module):
    """Several matrices in one parameter, as fused experts have them; each is applied to its share of the rows."""

    def __init__(self):
        super().__init__()
        self.boards = nn.Parameter(torch.randn(COUNT, OUT, IN))

    def forward(self, x):  # (COUNT, rows, IN)
        if isinstance(self.boards, LowRankLayer):
            return x @ self.boards.down.weight.mT @ self.boards.up.weight.mT
        return x @ self.boards.mT


class Boards(nn.Module):
    """The layer that `Shelf.boards` is."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.bias = weight, None


class Factor(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight


class LowRankBoards(LowRankLayer):
    origin, child_classes = "Boards", (Factor, Factor)

    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = Factor(down), Factor(up)

    count = property(lambda self: len(self.down.weight))
    rank = property(lambda self: self.down.weight.shape[1])
    in_features = property(lambda self: self.down.weight.shape[2])
    out_features = property(lambda self: self.up.weight.shape[1])

    @torch.no_grad()
    def product(self):
        return self.up.weight @ self.down.weight

    def to_dense(self):
        return Boards(nn.Parameter(self.product()))


class BoardsKind(Kind):
    dense, low_rank, label, weight_key = Boards, LowRankBoards, "boards", ""

    @classmethod
    def parts(cls, module):
        if not isinstance(module, Shelf) or not isinstance(module.boards, nn.Parameter):
            return {}
        view = vars(module).setdefault("_boards", Boards(module.boards))
        view.weight = module.boards
        return {"boards": view}

    @property
    def seat(self):
        return self.layer.weight if isinstance(self.layer, Boards) else self.layer

    def matrix(self, tensor, part="dense"):
        return tensor

    def tensor(self, matrix, part, shape):
        return matrix

    def dense_shape(self, down, up):
        return (len(up), up.shape[1], down.shape[2])

    def shapes(self, rank):
        if isinstance(self.layer, LowRankBoards):
            c, m, n = self.layer.count, self.layer.out_features, self.layer.in_features
        else:
            c, m, n = self.layer.weight.shape
        return {"dense": (c, m, n), "down": (c, rank, n), "up": (c, m, rank)}

    def stand_in(self, down, up, rank=0):
        rank = down.shape[1] if down is not None else rank
        like = self.layer.weight
        return LowRankBoards(self.filled("down", down, rank, like), self.filled("up", up, rank, like))


@pytest.fixture
def shelves(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "Boards", BoardsKind)
    torch.manual_seed(0)
    return nn.Sequential(Shelf(), nn.Linear(OUT, 4))


def test_the_table_names_what_users_have():
    assert labels("or", linear=True) == "nn.Linear or Conv1D"
    with pytest.raises(TypeError, match="LayerNorm"):
        kind_of(nn.LayerNorm(4))


def test_a_parameter_can_be_a_layer(shelves):
    assert [name for name, _ in find_layers(shelves)] == ["0.boards", "1"]
    assert layer_at(shelves, "0.boards") is layer_at(shelves, "0.boards")
    assert layer_at(shelves, "1.weight") is None and layer_at(shelves, "0") is None
    kind = kind_of(layer_at(shelves, "0.boards"))
    assert kind.size == (OUT, IN) and kind.count == COUNT and kind.rank_of("down", (COUNT, 5, IN)) == 5


def test_a_stack_is_factorized_with_its_optimizer_and_merged(shelves):
    before = shelves[0].boards.detach().clone()
    optimizer = torch.optim.AdamW(shelves.parameters(), lr=1e-3)
    x = torch.randn(COUNT, 5, IN)
    shelves(x).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[shelves[0].boards]["exp_avg"].clone()
    report = factorize(shelves, {"0.boards": 6}, optimizer)
    pair = shelves[0].boards
    assert isinstance(pair, LowRankBoards) and report.plan.decisions["0.boards"].count == COUNT
    assert report.target_parameters_after == COUNT * 6 * (OUT + IN)
    assert torch.allclose(optimizer.state[pair.up.weight]["exp_avg"], momentum @ pair.down.weight.mT, atol=1e-6)
    shelves(x).square().mean().backward()
    optimizer.step()
    product = pair.product()
    merge(shelves)
    assert isinstance(shelves[0].boards, nn.Parameter) and torch.equal(shelves[0].boards, product)
    assert shelves[0].boards.shape == before.shape and "0.boards" in dict(shelves.named_parameters())


def test_a_failed_switch_puts_the_parameter_back(shelves, monkeypatch):
    weight, fail = shelves[0].boards, lambda self: (_ for _ in ()).throw(OSError("full"))
    monkeypatch.setattr(NoteStructure, "apply", fail)
    with pytest.raises(OSError, match="full"):
        factorize(shelves, {"0.boards": 6, "1": 3})
    assert shelves[0].boards is weight and type(shelves[1]) is nn.Linear


def test_a_plan_of_a_stack_counts_all_its_matrices(shelves):
    plan = estimate_ranks(shelves, CuttlefishConfig(target_modules=["boards"], rank_rule="ratio", rank_multiple=1))
    assert plan["0.boards"] == 4 and plan.parameters() == (COUNT * OUT * IN, COUNT * 4 * (OUT + IN))
    assert type(plan).from_json(plan.to_json()) == plan
    assert StableRankTracker().measure({"w": dense_weight(layer_at(shelves, "0.boards"))})["w"] > 1


def test_the_spectrum_of_a_stack_says_what_a_rank_costs_all_of_it():
    torch.manual_seed(0)
    weights = torch.randn(COUNT, OUT, IN)
    tokens = [1.0, 2.0, 5.0]
    moments = [
        LayerMoments.from_full(w, torch.eye(IN), torch.eye(OUT), mean=torch.randn(IN), tokens=t)
        for w, t in zip(weights, tokens, strict=True)
    ]
    whole = decompose(weights, moments)
    single = [decompose(w, m) for w, m in zip(weights, moments, strict=True)]
    dropped = sum(t * float(d.spectrum[4:].square().sum()) for d, t in zip(single, tokens, strict=True))
    assert float(whole.spectrum[4:].square().sum()) == pytest.approx(dropped)
    factors = cut(whole, 4)
    for i, d in enumerate(single):
        one = cut(d, 4)
        assert torch.allclose(factors.up[i] @ factors.down[i], one.up @ one.down, atol=1e-9)
        assert torch.allclose(factors.bias_shift[i], one.bias_shift, atol=1e-9)
    rough = rough_cut(whole, 4)
    assert torch.allclose((rough.up @ rough.down).double(), factors.up @ factors.down, atol=1e-4)


def test_state_of_a_weight_with_four_dimensions_is_projected_in_their_order():
    """First moments are exact: the gradients of the factors are G V^T and U^T G, whatever shape the parameters have."""
    torch.manual_seed(0)
    down, up = torch.randn(4, 3, 5, 5), torch.randn(8, 4, 1, 1)
    gradient = torch.randn(8, 3, 5, 5)
    for_down, for_up = project({"exp_avg": gradient, "step": 3}, down, up, Layout())
    wanted = torch.einsum("or,oikl->rikl", up[:, :, 0, 0], gradient)
    assert for_down["exp_avg"].shape == down.shape and torch.allclose(for_down["exp_avg"], wanted, atol=1e-4)
    assert for_up["exp_avg"].shape == up.shape and for_up["step"] == 3
    assert torch.allclose(for_up["exp_avg"][:, :, 0, 0], torch.einsum("oikl,rikl->or", gradient, down), atol=1e-4)
    two = torch.stack([gradient, 2 * gradient])
    both, _ = project({"exp_avg": two}, down, up, Layout())
    assert torch.allclose(both["exp_avg"][1], 2 * wanted, atol=1e-4) and both["exp_avg"].shape == (2, *down.shape)
    row, column = torch.rand(8, 3, 5), torch.rand(8, 3, 5)
    factored, _ = project({"exp_avg_sq_row": row, "exp_avg_sq_col": column}, down, up, Layout())
    v = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * column.unsqueeze(-2)
    v_down = torch.einsum("or,oikl->rikl", up[:, :, 0, 0] ** 2, v)
    assert torch.allclose(factored["exp_avg_sq_row"], v_down.mean(-1), rtol=1e-4)


def test_a_copy_of_a_stack_has_a_view_of_its_own(shelves):
    other = copy.deepcopy(shelves)
    assert layer_at(other, "0.boards").weight is other[0].boards
