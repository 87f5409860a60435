"""`embeddings=True` in a run: what is seen of tables and of what is tied to them, the switch, a resume, engines, the optimizer."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.embedding import LowRankEmbedding
from hf_cuttlefish.layers.kinds import kind_of
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.maths.factors import INPUT_DAMPING, LayerMoments, cut, decompose
from hf_cuttlefish.maths.tied import joined
from hf_cuttlefish.measure.moments import MomentCollector

TOKENS, WIDTH = 80, 16
SHAPE = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
TABLE = "bert.embeddings.word_embeddings"
CONFIG = {"embeddings": True, "switch_step": 6, "statistics_steps": 4, "rank_multiple": 2, "on_error": "raise"}


def build(kind):
    torch.manual_seed(0)
    if kind == "classifier":
        return hf.BertForSequenceClassification(hf.BertConfig(**BERT))
    if kind == "masked":
        return hf.BertForMaskedLM(hf.BertConfig(**BERT))
    if kind == "t5":
        sizes = {
            "vocab_size": TOKENS,
            "d_model": WIDTH,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 8,
            "dropout_rate": 0.0,
        }
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, tie_word_embeddings=kind == "tied"))


def batches(kind):
    """Tokens of which the first ones are frequent, the last 20 never seen, and padding at the end."""
    weights = torch.cat([torch.zeros(1), 1 / torch.arange(1.0, 60.0), torch.zeros(20)])
    ids = torch.multinomial(weights, 64 * 9, replacement=True, generator=torch.Generator().manual_seed(1)).view(8, 8, 9)
    for rows in ids:
        if kind == "classifier":
            rows = rows.clone()
            rows[:, 7:] = 0
            yield {"input_ids": rows, "attention_mask": (rows != 0).long(), "labels": (rows[:, 0] > 5).long()}
        else:
            yield {"input_ids": rows, "labels": rows}


def run(kind, steps=12, made=None, **config):
    model = made or build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    cuttlefish = Cuttlefish(model, optimizer, CuttlefishConfig(**{**CONFIG, **config}), total_steps=12)
    losses = []
    given = list(batches(kind))
    for step in range(steps):
        loss = model(**given[step % 8]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        cuttlefish.step()
    return model, optimizer, cuttlefish, losses


@pytest.mark.parametrize("kind", ["classifier", "masked", "tied", "untied", "t5"])
def test_the_table_is_cut_in_a_run_and_trained_on(kind):
    model, optimizer, cuttlefish, losses = run(kind)
    low = low_rank_layers(model)
    tables = [name for name, layer in low.items() if isinstance(layer, LowRankEmbedding)]
    assert len(tables) == 1 and tables[0] in cuttlefish.plan and cuttlefish.switch_step == 6
    assert ("lm_head" in cuttlefish.plan) is (kind == "untied")
    assert losses[-1] < losses[0] and abs(losses[6] - losses[5]) < 0.5
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    decision = cuttlefish.plan.decisions[tables[0]]
    assert (decision.in_features, decision.out_features) == (TOKENS, WIDTH) and decision.predicted_loss_increase > 0
    assert (
        "state carried for" in cuttlefish.report.optimizer
        and cuttlefish.report.parameters_after < 0.75 * cuttlefish.report.parameters_before
    )
    # The state is that of the table, projected: its first moment times `up`.
    state = optimizer.state[low[tables[0]].down.weight]
    assert state["exp_avg"].shape == low[tables[0]].down.weight.shape and int(state["step"]) == 12


@pytest.mark.parametrize("optim", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_state_lies_in_memory_as_its_parameter_does(optim):
    """A fused optimizer on a GPU takes no other dtype, device or strides."""
    model = build("tied")
    more = {"fused": True} if optim is torch.optim.AdamW else {"momentum": 0.9} if optim is torch.optim.SGD else {}
    optimizer = optim(model.parameters(), lr=1e-3, **more)
    rows = next(batches("tied"))
    for _ in range(2):
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    factorize(model, dict.fromkeys(find_targets(model, CuttlefishConfig(embeddings=True)), 4), optimizer)
    for parameter, state in optimizer.state.items():
        for value in (v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape):
            assert (value.dtype, value.device, value.stride()) == (
                parameter.dtype,
                parameter.device,
                parameter.stride(),
            )
    model(**rows).loss.backward()
    optimizer.step()


def test_what_is_seen_of_a_table_are_its_tokens_and_their_embeddings():
    """Padding has no gradient and does not count; a loop over the tokens gives the same sums."""
    model = build("classifier")
    table = model.get_submodule(TABLE)
    collector = MomentCollector(model, {TABLE: table})
    collector.start()
    counts, signal = torch.zeros(TOKENS), torch.zeros(WIDTH, WIDTH)
    for batch in batches("classifier"):
        model(**batch).loss.backward()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            for token in row[mask.bool()]:
                counts[token] += 1
                signal += torch.outer(table.weight[token], table.weight[token]).detach()
    collector.stop()
    assert torch.equal(collector.sums[TABLE]["x"], counts) and counts[0] == 0 and counts[60:].sum() == 0
    torch.testing.assert_close(collector.sums[TABLE]["signal"], signal, rtol=1e-4, atol=1e-4)
    moments = collector.moments()[TABLE]
    assert moments.tokens == pytest.approx(7.0) and moments.other_level == pytest.approx(1 / TOKENS)


def test_rows_that_occur_are_kept_better_and_the_others_a_little():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, TOKENS, generator=generator)
    counts = torch.zeros(TOKENS)
    counts[:20] = 1 / 20
    moments = LayerMoments.from_full(weight, covariance=torch.diag(counts))
    assert moments.other_level == pytest.approx(1 / TOKENS)
    error = {}
    for name, given in (("frequency", moments), ("plain", None)):
        found = cut(decompose(weight, given), 8)
        error[name] = (found.up @ found.down - weight.double()).square().sum(0)
    assert error["frequency"][:20].sum() < 0.9 * error["plain"][:20].sum()
    assert error["frequency"][20:].sum() < 0.9 * weight[:, 20:].square().sum()  # not dropped: damping weighs them
    assert 0 < INPUT_DAMPING < 0.1


def test_the_moments_of_what_is_tied_are_joined():
    model = build("masked")
    table, output = model.get_submodule(TABLE), model.get_output_embeddings()
    collector = MomentCollector(model, {TABLE: table})
    assert list(collector.layers) == [TABLE, f"{TABLE}/0"] and collector.layers[f"{TABLE}/0"] is output
    collector.start()
    for batch in batches("masked"):
        model(**batch).loss.backward()
    collector.stop()
    moments = collector.moments()
    assert list(moments) == [TABLE]
    alone = MomentCollector(model, {"bert.encoder.layer.0.output.dense": model.bert.encoder.layer[0].output.dense})
    assert "/0" not in "".join(alone.layers)
    saved = collector.state_dict()
    again = MomentCollector(model, {TABLE: table})
    again.load_state_dict(saved)
    torch.testing.assert_close(again.moments()[TABLE].signal, moments[TABLE].signal)


def test_joined_moments_lose_what_their_uses_lose_where_these_agree():
    """Uses with the same metric and signals in proportion: the sum is exact, and of each one part."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    signal, metric = weight @ weight.mT, a @ a.mT
    one = LayerMoments(signal, metric, 0.0, None, 3.0)
    other = LayerMoments(2 * signal, 5 * metric, 0.0, None, 1.0)
    both = joined(weight, [(one, False), (other, True)])
    change = torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def loss(m):
        return m.tokens / 2 * torch.trace(m.metric @ change @ m.signal @ change.mT)

    torch.testing.assert_close(loss(both), loss(one) + loss(other))
    assert joined(weight, [(one, False)]) is one


@pytest.mark.parametrize("kind", ["masked", "t5"])
def test_checkpoints_of_both_phases_load_into_either_model(kind):
    from hf_cuttlefish import follow_checkpoints

    dense = build(kind)
    low, *_ = run(kind, made=copy.deepcopy(dense))
    states = {"dense": copy.deepcopy(dense.state_dict()), "low": copy.deepcopy(low.state_dict())}
    batch = next(batches(kind))
    with torch.no_grad():
        wanted = {"dense": dense.eval()(**batch).loss, "low": low.eval()(**batch).loss}
        for model in (dense, low):
            follow_checkpoints(model)
            for which in ("low", "dense", "low"):
                model.load_state_dict(states[which])
                torch.testing.assert_close(model(**batch).loss, wanted[which])
                assert bool(low_rank_layers(model)) is (which == "low")


def test_an_engine_that_divides_weights_refuses_a_table():
    from hf_cuttlefish.engines.base import ShardedEngine

    assert ShardedEngine.takes_vocabulary is False
    with pytest.raises(ValueError, match="embeddings=True finds no table of tokens in Sequential"):
        Cuttlefish(
            nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))),
            None,
            CuttlefishConfig(embeddings=True),
            total_steps=9,
        )


def test_a_table_can_be_excluded_or_set_by_hand():
    model, _, cuttlefish, _ = run("untied", exclude_modules=["embed_tokens"], rank_pattern={"lm_head": 6})
    assert cuttlefish.plan["lm_head"] == 6 and "model.embed_tokens" not in cuttlefish.plan
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert kind_of(model.lm_head).is_linear
