"""Layers that go first, by the published formula; what is left is a model like any other."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allocation import similarity_by_definition
from tiny_models import make_tiny_model
from tiny_text_model import make_tiny_tokenizer, save_tiny_text_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.errors import AttachError, ConfigError, DataError
from attention_predictor.eval.analysis.pruning.layer_scores import block_influence, measure
from attention_predictor.eval.analysis.pruning.plan import Plan, importance, normalised, order, read_scores
from attention_predictor.eval.analysis.pruning.shorten import save, without_layers
from attention_predictor.eval.analysis.pruning.sweep import RANDOM, Sweep, bits_per_token, make_orders
from attention_predictor.offload.policies.query_similarity import query_similarity

# Four layers each, so that something is left; lists by layer are as long.
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
DEEP = {
    "llama": {},
    "llama-mha": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "qwen3-moe": {"mlp_only_layers": [1, 3]},
    "gemma2": {"layer_types": MIXED, "tie_word_embeddings": True},
    "gemma3": {"layer_types": MIXED},
    "phi3": {},
    "gpt-oss": {"layer_types": MIXED},
}


def deep(family, **changes):
    return make_tiny_model(family, num_hidden_layers=4, **(DEEP[family] | changes))


# ---- the order -------------------------------------------------------------------------------------------------------


def test_the_published_formula():
    scores = {"bi": [0.5, 0.1, 0.3, 0.2], "q_similarity": [0.9, 0.5, 0.7, 0.6]}
    assert normalised(scores["bi"]) == pytest.approx([1, 0, 0.5, 0.25])
    assert normalised(scores["q_similarity"]) == pytest.approx([1, 0, 0.5, 0.25])
    assert importance(scores, "tappa", 0.4) == pytest.approx([1.0, 0.4, 0.7, 0.55])
    assert [order(importance(scores, metric, 0.4)) for metric in ("bi", "qsim", "tappa")] == [
        [1, 3, 2, 0],
        [0, 2, 3, 1],
        [1, 3, 2, 0],
    ]
    # With more weight on queries the layer that changes most goes first: its queries are the most alike.
    assert order(importance(scores, "tappa", 2.0)) == [0, 2, 3, 1]
    assert Plan(scores, "tappa", 2.0, 2).removed == [0, 2]


@settings(max_examples=200, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(-64, 64), st.integers(-64, 64)), min_size=2, max_size=40),
    beta=st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]),
)
def test_normalisation_combination_and_order_are_exact(layers, beta):
    bi, q = ([number / 64 for number in column] for column in zip(*layers, strict=True))

    def norm(values, value):
        return 0.0 if max(values) == min(values) else (value - min(values)) / (max(values) - min(values))

    expected = [norm(bi, b) + beta * (1 - norm(q, s)) for b, s in zip(bi, q, strict=True)]
    found = importance({"bi": bi, "q_similarity": q}, "tappa", beta)
    assert found == expected
    removed = order(found)
    assert sorted(removed) == list(range(len(layers)))
    for first, then in itertools.pairwise(removed):
        assert (expected[first], first) < (expected[then], then)
    assert order(importance({"bi": bi}, "bi")) == sorted(
        range(len(bi)), key=bi.__getitem__
    )  # which keeps ties in order


def test_ties_go_by_layer():
    assert order([0.5, 0.25, 0.5, 0.25]) == [1, 3, 0, 2]
    same = {"bi": [0.3] * 4, "q_similarity": [0.7] * 4}
    assert importance(same, "tappa", 0.5) == [0.5] * 4
    assert [Plan(same, metric, 0.3, 2).removed for metric in ("bi", "qsim", "tappa")] == [[0, 1]] * 3


def test_score_files(tmp_path):
    def written(name, found):
        (tmp_path / name).write_text(found if isinstance(found, str) else json.dumps(found))
        return tmp_path / name

    bi, q = written("bi.json", {"bi": [1, 2, 3]}), written("q.json", {"q_similarity": [0.1, None, 0.3], "more": 1})
    scores, model = read_scores([bi, q])
    assert model is None
    assert scores == {"bi": [1, 2, 3], "q_similarity": [0.1, None, 0.3]}
    assert order(importance(scores, "bi")) == [0, 1, 2]
    with pytest.raises(DataError, match=r"--metric tappa needs q_similarity of each layer: layers \[1\] have none"):
        importance(scores, "tappa")
    with pytest.raises(DataError, match="--metric qsim needs q_similarity of each layer, which no score file has"):
        importance(read_scores([bi])[0], "qsim")
    with pytest.raises(DataError, match=r"different depth: bi of 3 layers in .*, q_similarity of 2 layers"):
        read_scores([bi, written("short.json", {"q_similarity": [1, 2]})])
    with pytest.raises(DataError, match=r"bi is in .*bi.json too"):
        read_scores([bi, written("again.json", {"bi": [1, 2, 3]})])
    theirs = {"model": "some-7b", "score_type": "BI", "scores": [1, 2, 3]}
    other = {"model": "other-7b", "score_type": "q_similarity", "scores": [0.1, 0.2, 0.3]}
    published = written("published.json", theirs)
    assert read_scores([published, q]) == (scores, "some-7b")
    ours = {"q_similarity": [0.1, 0.2, 0.3], "settings": {"model": "shorter-7b", "scores_of": "some-7b"}}
    for same in (other | {"model": "some-7b"}, ours):
        found = {"bi": [1, 2, 3], "q_similarity": [0.1, 0.2, 0.3]}
        assert read_scores([published, written("same.json", same)]) == (found, "some-7b")
    with pytest.raises(DataError, match=r"different models: some-7b in .*published.json, mine in .*mine.json"):
        read_scores([published, written("mine.json", ours | {"settings": {"model": "mine"}})])
    with pytest.raises(DataError, match=r"different models: some-7b in .*published.json, other-7b in .*other.json"):
        read_scores([published, written("other.json", other)])
    for bad, message in (
        ({"score_type": "angle", "scores": [1, 2]}, "score_type 'angle': expected BI or q_similarity"),
        ({"score_type": ["BI"], "scores": [1, 2]}, "score_type"),
        ({"scores": [1, 2]}, "score_type None: expected BI or q_similarity"),
        ({"score_type": "BI", "scores": 3}, "expected a list of numbers"),
        ("{", "not readable as JSON"),
        ([1, 2], "expected an object with bi"),
        ({"order": [1]}, "expected an object with bi"),
        ({"bi": []}, "expected a list of numbers"),
        ({"bi": [1, "2"]}, "expected a list of numbers"),
        ('{"bi": [1, NaN]}', "expected a list of numbers"),
        ({"bi": [True, 2]}, "expected a list of numbers"),
    ):
        with pytest.raises(DataError, match=message):
            read_scores([written("bad.json", bad)])
    with pytest.raises(DataError, match="not readable"):
        read_scores([tmp_path / "absent.json"])


# ---- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3", "gemma2", "gpt-oss", "qwen3-moe"])
def test_scores_equal_their_definitions(ids, family):
    """With and without groups of query heads, QK-norm, sliding layers and softcap."""
    model, texts = deep(family), [ids(150, seed=seed)[0] for seed in range(2)]
    before = model.config._attn_implementation
    found = measure(model, [text.tolist() for text in texts])
    assert model.config._attn_implementation == before
    states, queries = {}, {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda layer, args, kwargs, out, number=number: states.setdefault(number, []).append(
                (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
        last = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        last.register_forward_hook(
            lambda module, args, out, number=number: queries.update({number: [*queries.get(number, []), out]})
        )
    for text in texts:
        model(text[None], use_cache=False)
    position = torch.arange(150)[None]
    for number, layer in enumerate(model.model.layers):
        pairs = [(a[0, t].double(), b[0, t].double()) for a, b in states[number] for t in range(150)]
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        assert found["bi"][number] == pytest.approx(1 - math.fsum(cosines) / len(cosines), abs=2e-6)
        rotary = model.model.rotary_emb
        cos, sin = rotary(torch.zeros(1), position)
        if cos.shape[-1] == 4:  # gpt-oss gives each angle once
            cos, sin = (torch.cat([x, x], -1) for x in (cos, sin))
        similarities = []
        for out in queries[number]:
            query_HTD = out.view(150, -1, 8).transpose(0, 1)
            half_HTD = torch.cat([-query_HTD[..., 4:], query_HTD[..., :4]], -1)
            similarities += map(similarity_by_definition, (query_HTD * cos + half_HTD * sin)[:, -32:])
        assert found["q_similarity"][number] == pytest.approx(math.fsum(similarities) / len(similarities), abs=1e-6)
        assert not any(name.startswith("_attention_predictor") for name in vars(layer.self_attn))


def test_similarity_is_exact_for_many_heads_and_few():
    """1e-6 of the definition, whatever the queries' size and however many there are."""
    torch.manual_seed(1)
    for heads, scale in ((1, 1e-3), (4, 1.0), (32, 1e3)):
        query_BHTD = scale * (torch.randn(1, heads, 32, 16) + torch.randn(1, heads, 1, 16))
        true = [similarity_by_definition(query_TD) for query_TD in query_BHTD[0]]
        assert (query_similarity(query_BHTD)[0].double() - torch.tensor(true)).abs().max() < 1e-6


def test_influence_of_what_changes_nothing_and_what_turns():
    state = torch.randn(1, 9000, 8)
    assert block_influence(state, 2 * state) == pytest.approx(0, abs=1e-6)
    assert block_influence(state, -state) == pytest.approx(2, abs=1e-6)


# ---- what is left ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", DEEP)
@pytest.mark.parametrize("removed", [[1], [0, 2]])
def test_a_pruned_model_is_the_model_without_these_layers(ids, tmp_path, family, removed):
    """Saved, loaded, generating and offloaded; judged by the whole model with these layers passed over."""
    model, prompt = deep(family), ids(150)
    whole = model(prompt, use_cache=False).logits
    before = model.config.to_dict()
    with without_layers(model, removed) as pruned:
        shorter = pruned(prompt, use_cache=False).logits
        save(pruned, make_tiny_tokenizer(), tmp_path, torch.float32)
    assert model.config.to_dict() | {"architectures": None} == before  # which saving sets
    assert torch.equal(model(prompt, use_cache=False).logits, whole)
    for number in removed:
        model.model.layers[number].forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert torch.equal(model(prompt, use_cache=False).logits, shorter)

    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 4 - len(removed)
    kept = [number for number in range(4) if number not in removed]
    if before.get("layer_types") is not None:
        assert loaded.config.layer_types == [before["layer_types"][number] for number in kept]
    assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == list(range(len(kept)))
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == bool(before["tie_word_embeddings"])
    assert torch.allclose(loaded(prompt, use_cache=False).logits, shorter, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == make_tiny_tokenizer()("ab")["input_ids"]

    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    stock = loaded.generate(prompt, **greedy)
    assert stock.shape[1] > 150
    with attach(loaded, OffloadConfig(predictor="ema", budget=1024)):
        assert torch.equal(loaded.generate(prompt, **greedy), stock)
    small = {"predictor": "ema", "budget": 96, "sink": 16, "recent": 16}
    with attach(loaded, OffloadConfig(**small, budget_allocation="qsim")) as engine:
        loaded.generate(prompt, **greedy)
    assert len(engine.stats.layer_budgets) == len(engine.tiered_layers)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-mha", "gpt-oss"])
def test_saving_in_another_precision_leaves_the_model_alone(ids, tmp_path, family):
    model, prompt = deep(family), ids(100)
    for weight in model.parameters():  # as of a checkpoint in bf16
        weight.copy_(weight.bfloat16())
    before = model(prompt, use_cache=False).logits
    save(model, make_tiny_tokenizer(), tmp_path, torch.bfloat16)
    assert torch.equal(model(prompt, use_cache=False).logits, before)
    assert model.config.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert torch.allclose(wide(prompt, use_cache=False).logits, before, atol=1e-5)


def test_lists_of_layer_numbers_are_counted_anew():
    model = deep("qwen3-moe")
    with without_layers(model, [0, 3]):
        assert model.config.mlp_only_layers == [0]
    assert model.config.mlp_only_layers == [1, 3]


def test_an_interruption_restores_the_model(ids):
    model = deep("gemma2")
    layers = model.model.layers
    with pytest.raises(KeyboardInterrupt), without_layers(model, [1]):
        raise KeyboardInterrupt
    assert model.model.layers is layers
    assert model.config.layer_types == MIXED
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]


def test_what_a_configuration_cannot_say_is_refused():
    """Every second layer has experts: without the first it would be the other half, when loaded."""
    model = deep("qwen3-moe", mlp_only_layers=[], decoder_sparse_step=2)
    with (
        pytest.raises(ConfigError, match=r"can't be described by its configuration: .*layers.0.mlp.* is "),
        without_layers(model, [0]),
    ):
        pass
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    with pytest.raises(ConfigError, match="removing 4 of 4 layers would leave none"), without_layers(model, range(4)):
        pass


def test_models_whose_layers_cannot_be_told_are_refused():
    model = deep("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(AttachError, match="no list of 3 decoder layers"), without_layers(model, [0]):
        pass
    model.config.num_hidden_layers, model.config.num_kv_shared_layers = 4, 1
    with pytest.raises(AttachError, match="its layers share keys and values"), without_layers(model, [0]):
        pass


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_judges_every_order(ids):
    model, texts = deep("llama"), [ids(60, seed=seed)[0].tolist() for seed in range(2)]
    scores = {"bi": [0.4, 0.1, 0.3, 0.2], "q_similarity": [0.1, 0.2, 0.9, 0.3]}
    orders = make_orders(scores, 0.3, 3, 4)
    assert orders["bi"] == [[1, 3, 2, 0]]
    assert orders["qsim"] == [[2, 3, 1, 0]]
    assert len(orders[RANDOM]) == 3
    assert all(sorted(one) == [0, 1, 2, 3] for one in orders[RANDOM])
    calls = []
    sweep = Sweep.run(model, texts, orders, 3, lambda: calls.append(1))
    assert len(calls) == 6 * 4
    with torch.no_grad():
        losses = [model(torch.tensor([text]), labels=torch.tensor([text])).loss.item() for text in texts]
    for several in sweep.bits.values():
        for one in several:
            assert one[0] == pytest.approx(sum(losses) / 2 / math.log(2), rel=1e-5)
    with without_layers(model, orders["qsim"][0][:2]):
        assert sweep.bits["qsim"][0][2] == bits_per_token(model, texts)
    lines = sweep.table().splitlines()
    assert lines[0].split() == ["layers", "removed", "bi", "qsim", "tappa", "random", "range"]
    assert len(lines) == 1 + 4 + 1
    assert lines[1].split()[1] == f"{2 ** sweep.bits['bi'][0][0]:,.2f}"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_text_model(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"Number {number} was never seen again. " * (20 if number else 1))
    return folder


def prune(*words: object) -> int:
    return main(["prune", *map(str, words)])


def test_from_texts_to_a_model_and_its_plan(tiny, texts, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    assert prune("--model", tiny, "--data", texts, "--context", 200, "--layers", 2, "--beta", 0.2, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "1 of 3 documents have fewer than 200 tokens and are skipped" in shown
    saved = json.loads((out / "scores.json").read_text())
    assert saved["removed"] == sorted(saved["order"][:2])
    assert saved["importance"] == [
        bi + 0.2 * (1 - q) for bi, q in zip(saved["bi_norm"], saved["q_similarity_norm"], strict=True)
    ]
    assert len(saved["bi"]) == len(saved["q_similarity"]) == 4
    assert shown.count("removed") == 2
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2

    scores = out / "scores.json"
    assert prune("--plan-only", "--scores", scores, "--beta", 0.2, "--layers", 2, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert {name: again[name] for name in ("order", "removed", "importance")} == {
        name: saved[name] for name in ("order", "removed", "importance")
    }
    assert prune("--plan-only", "--scores", scores, "--metric", "bi") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines[1:]] == sorted(range(4), key=saved["bi"].__getitem__)
    # The same scores remove other layers, without text.
    other = tmp_path / "other"
    assert prune("--model", tiny, "--scores", scores, "--metric", "qsim", "--layers", 1, "--out", other) == 0
    assert "--scores are of" not in caplog.text
    assert json.loads((other / "scores.json").read_text())["removed"] == [
        max(range(4), key=saved["q_similarity"].__getitem__)
    ]
    # Of a model of another name that may be the same they serve too, but not without a word.
    renamed = tmp_path / "renamed"
    renamed.symlink_to(tiny)
    again = tmp_path / "again"
    for at, source in ((again, scores), (tmp_path / "last", again / "scores.json")):
        assert prune("--model", renamed, "--scores", source, "--metric", "bi", "--layers", 1, "--out", at) == 0
        assert f"--scores are of {str(tiny)!r}, --model is {str(renamed)!r}" in caplog.text
        caplog.clear()


def test_a_sweep_from_the_command_line(tiny, texts, tmp_path, capsys):
    words = ["--model", tiny, "--data", texts, "--context", 100, "--layers", 3, "--sweep", texts, "--seeds", 2]
    assert prune(*words, "--out", tmp_path, "--plot", tmp_path / "sweep.png") == 0
    assert "random: 2 to the power of the mean bits a token of 2 orders" in capsys.readouterr().out
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [len(one) for one in found["bits_per_token"]["random"]] == [4, 4]
    assert found["orders"]["tappa"] == [json.loads((tmp_path / "scores.json").read_text())["order"]]
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", 4], "--layers 4: expected 1 to 3, the model has 4 layers"),
        (["--layers", 0], "--layers 0: expected 1 to 3"),
        ([], "--layers is required"),
        (["--layers", 1, "--metric", "size"], "--metric size: expected one of bi, qsim, tappa"),
        (["--layers", 1, "--beta", "nan"], "--beta nan: expected a number from 0 on"),
        (["--layers", 1, "--beta", "-1"], "--beta -1: expected a number from 0 on"),
        (["--layers", 1, "--context", 5000], "--context 5000: the model has positions for 4096 tokens"),
        (["--layers", 1, "--context", 3000], "no document has 3000 tokens (--context)"),
        (["--layers", 1, "--context", 32], "--context 32: expected more than the 32 queries"),
        (["--layers", 1, "--documents", 0], "--documents 0: expected at least 1"),
        (["--layers", 1, "--plot", "x.png"], "--plot needs --sweep"),
        (["--layers", 1, "--plan-only"], "--plan-only needs --scores"),
        (["--layers", 1, "--model", "/nowhere"], "'/nowhere': no such directory"),
    ],
)
def test_bad_options(tiny, texts, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(
        "attention_predictor.eval.analysis.pruning.command.load_model", lambda *_: pytest.fail("the model was loaded")
    )
    given = ["--model", tiny, "--data", texts, "--context", 100, "--out", tmp_path / "out", *words]
    assert prune(*given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_scores_and_places(tiny, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "attention_predictor.eval.analysis.pruning.command.load_model", lambda *_: pytest.fail("the model was loaded")
    )
    (tmp_path / "five.json").write_text('{"bi": [1, 2, 3, 4, 5], "q_similarity": [1, 2, 3, 4, 5]}')
    (tmp_path / "four.json").write_text('{"bi": [1, 2, 3, 4]}')
    five, four, out = tmp_path / "five.json", tmp_path / "four.json", tmp_path / "out"
    common = ["--model", tiny, "--layers", 1, "--out", out]
    for words, message in (
        ([*common, "--scores", five], f"--scores are of a model with 5 layers: {tiny} has 4"),
        ([*common, "--scores", four], "--metric tappa needs q_similarity of each layer, which no score file has"),
        ([*common, "--scores", four, "--metric", "bi", "--sweep", texts], "--metric qsim needs q_similarity"),
        (
            [*common, "--scores", four, "--data", texts],
            "--data and --scores: texts to score layers by, or their scores",
        ),
        (common, "--data or --scores is required"),
        (["--model", tiny, "--layers", 1, "--data", texts], "--out is required"),
        (["--model", tiny, "--layers", 1, "--data", texts, "--out", tiny], f"--out {tiny} holds a model already"),
        (["--plan-only", "--scores", five, "--layers", 5], "--layers 5: expected 1 to 4, the model has 5 layers"),
        (["--plan-only", "--scores", four], "--metric tappa needs q_similarity"),
    ):
        assert prune(*words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()
