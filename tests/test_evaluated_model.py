"""EvaluatedModel: a generation and the likelihood of a reference behind one prefill."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tests.tiny_models import make_tiny_model

from attention_predictor.errors import ContextLengthError, HostMemoryError
from attention_predictor.eval.harness import evaluated_model
from attention_predictor.eval.harness.attached_model import AttachedModel
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.variants import Variant
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policy_names import BUILT_IN

PROMPT, REFERENCE = list(range(3, 90)) * 4, list(range(40, 60))


class Words:
    """A tokenizer that only decodes."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def variant(policy: str) -> Variant:
    return Variant.of(Rule(policy, {"policy": policy}), 144)


def figures(record: dict) -> tuple:
    return record["pred"], record["new_tokens"], record["prompt_tokens"], record["answer_tokens"]


@pytest.mark.parametrize("policy", tuple(BUILT_IN))
def test_one_prefill_serves_both(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model()
    lengths: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)  # the name of its argument for the cache is read from its signature
    def counted(self: torch.nn.Module, input_ids: torch.Tensor, **given: object) -> object:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **given)

    with AttachedModel(model, variant(policy)) as attached:
        with attached.sample() as engine:
            subject = EvaluatedModel(model, engine)
            apart = subject.generate(PROMPT, 24), subject.log_likelihoods(PROMPT, REFERENCE)
        monkeypatch.setattr(type(model), "forward", counted)
        attached.detach()
        with attached.sample() as engine:
            record = EvaluatedModel(model, engine).predict(Words(), PROMPT, 24, judge=REFERENCE)  # type: ignore[arg-type]
    assert figures(record) == (" ".join(map(str, apart[0])), len(apart[0]), len(PROMPT), len(REFERENCE))
    assert record["answer_log_likelihood"] == sum(apart[1])
    assert [length for length in lengths if length > 1] == [len(PROMPT)]


@pytest.mark.parametrize("error", [HostMemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_two_prefills_where_memory_holds_one_cache(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fails = make_tiny_model(), []

    def deepcopy(one: object, memo: dict | None = None) -> object:
        fails.append(one)
        raise error

    with AttachedModel(model, variant("predictor")) as attached, attached.sample() as engine:
        subject = EvaluatedModel(model, engine)
        expected = subject.predict(Words(), PROMPT, 24, judge=REFERENCE)  # type: ignore[arg-type]
        monkeypatch.setattr(evaluated_model, "copy", type("Failing", (), {"deepcopy": staticmethod(deepcopy)}))
        found = subject.predict(Words(), PROMPT, 24, judge=REFERENCE)  # type: ignore[arg-type]
    assert fails
    assert found == expected


def test_a_model_with_a_cache_of_its_own_is_prefilled_twice() -> None:
    model = make_tiny_model()
    expected = EvaluatedModel(model, None).predict(Words(), PROMPT, 24, judge=REFERENCE)  # type: ignore[arg-type]
    model.generation_config.cache_implementation = "static"
    assert EvaluatedModel(model, None).predict(Words(), PROMPT, 24, judge=REFERENCE) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [[], [7]])
def test_texts_of_no_and_one_token(text: list[int]) -> None:
    model = make_tiny_model()
    with AttachedModel(model, variant("predictor")) as attached, attached.sample() as engine:
        subject = EvaluatedModel(model, engine)
        found = subject.predict(Words(), PROMPT, 8, judge=text)  # type: ignore[arg-type]
        assert ("answer_log_likelihood" in found) == bool(text)
        if text:
            assert found["answer_log_likelihood"] == sum(subject.log_likelihoods(PROMPT, text))


@pytest.mark.parametrize("policy", ["predictor", "full"])
def test_what_fits_exactly_is_not_refused(policy: str) -> None:
    """The last token is never cached."""
    model = make_tiny_model(max_position_embeddings=400)
    prompt = (PROMPT * 2)[:376]
    with AttachedModel(model, variant(policy)) as attached, attached.sample() as engine:
        subject = EvaluatedModel(model, engine)
        assert len(subject.generate(prompt, 25, min_new_tokens=25)) == 25
        assert len(subject.log_likelihoods(prompt, (REFERENCE * 2)[:25])) == 25
        with pytest.raises(ContextLengthError):
            subject.generate(prompt, 26)


def test_a_copy_goes_its_own_way_from_the_original() -> None:
    model = make_tiny_model()
    with AttachedModel(model, variant("predictor")) as attached, attached.sample() as engine:
        assert engine is not None
        subject = EvaluatedModel(model, engine)
        cache = subject.new_cache()
        with torch.no_grad():
            model(torch.tensor([PROMPT]), **with_cache(model, cache))
            kept = copy.deepcopy(cache)
            for token in REFERENCE:
                model(torch.tensor([[token]]), **with_cache(model, cache))
        assert cache.get_seq_length() == len(PROMPT) + len(REFERENCE)
        assert kept.get_seq_length() == len(PROMPT)
        kept.check_integrity()
        cache.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", tuple(BUILT_IN))
def test_one_prefill_serves_both_on_a_gpu(policy: str) -> None:
    model = make_tiny_model().to("cuda")
    with AttachedModel(model, variant(policy)) as attached, attached.sample() as engine:
        subject = EvaluatedModel(model, engine)
        tokens, likelihoods = subject.generate(PROMPT, 24), subject.log_likelihoods(PROMPT, REFERENCE)
        record = subject.predict(Words(), PROMPT, 24, judge=REFERENCE)  # type: ignore[arg-type]
    assert record["pred"] == " ".join(map(str, tokens))
    assert record["answer_log_likelihood"] == pytest.approx(sum(likelihoods), abs=1e-3)
