"""Experts by domain: which domain a text is of, what its experts are, and that nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.tiny import factorize_quietly, some_ids, weights_only
from torch.nn import functional as F
from transformers import PreTrainedModel

import factorctl
from factorctl.errors import UsageError
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import hidden_of_all
from factorctl.models.building import factored_ffns
from factorctl.models.domain_fit import NUM_CLUSTERS, DomainFit, DomainText, fit_domains
from factorctl.models.domains import text_tokens, texts_of


@pytest.fixture(scope="module")
def made(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("domains") / "made"
    factorize_quietly(weights_only(dense_source(), out, num_experts=6, top_k=2, strategy="permuted"))
    return out


TEXTS = [
    DomainText(some_ids(1, length, seed).tolist()[0] if name == "any" else [low + i % 5 for i in range(length)], name)
    for name, low, length, seed in [("abc", 4, 30, 0), ("xyz", 22, 20, 1), ("abc", 5, 25, 2), ("xyz", 23, 30, 3)]
]
"""Two domains of letters that do not overlap, of several lengths."""


def teacher_of(_: int, ffn: FactoredFFN):  # type: ignore[no-untyped-def]
    """All experts on: what the dense FFN gives."""

    def teach(x_TD: torch.Tensor) -> torch.Tensor:
        hidden_TF = hidden_of_all(x_TD, ffn.experts).flatten(1)
        return F.linear(hidden_TF, ffn.down)

    return teach


def fitted(made: Path, texts: list[DomainText] | None = None) -> tuple[PreTrainedModel, DomainFit]:
    model = factorctl.load(made)
    fit = fit_domains(model, texts or TEXTS, 1000, list(factored_ffns(model)), teacher_of, seed=0)
    return model, fit


@torch.no_grad()
def test_a_domains_experts_are_those_of_a_plain_loop_in_float64_layer_by_layer(made: Path) -> None:
    _, fit = fitted(made)
    assert fit.domains.names == ("abc", "xyz")
    checked = factorctl.load(made).double()
    for ffn in factored_ffns(checked):
        ffn.router.zero_()
    inputs: dict[int, torch.Tensor] = {}
    for layer, ffn in enumerate(factored_ffns(checked)):
        sums = torch.zeros(2, 6, dtype=torch.float64)
        ffn.register_forward_pre_hook(lambda _, x, at=layer: inputs.__setitem__(at, x[0][0]))
        for text in TEXTS:
            domain = ("abc", "xyz").index(str(text.domain))
            for index, below in enumerate(factored_ffns(checked)):
                if index < layer:
                    below.chooser = lambda x, at=index, own=domain: fit.experts_LMK[at][own].long().expand(len(x), -1)
            checked.model(input_ids=torch.tensor([text.ids]))
            t_TD = teacher_of(layer, ffn)(inputs[layer])
            hidden_TNH = hidden_of_all(inputs[layer], ffn.experts)
            for expert in range(6):
                o_TD = hidden_TNH[:, expert] @ ffn.experts.down_NDH[expert].T
                off_T = (o_TD - t_TD).square().sum(1) - t_TD.square().sum(1)
                sums[domain, expert] += (off_T / t_TD.square().mean(1).sqrt()).sum()
        assert fit.experts_LMK[layer].tolist() == sums.topk(2, largest=False).indices.sort(1).values.tolist()


@torch.no_grad()
def test_every_token_of_a_text_takes_its_domains_experts_with_even_weights(made: Path) -> None:
    model, fit = fitted(made)
    rows = torch.tensor([TEXTS[0].ids[:20], TEXTS[1].ids])
    found = model(input_ids=rows).logits
    for row, domain in enumerate((0, 1)):
        alone = factorctl.load(made)
        for layer, ffn in enumerate(factored_ffns(alone)):
            ffn.router.zero_()
            ffn.chooser = lambda x, at=layer, own=domain: fit.experts_LMK[at][own].long().expand(len(x), -1)
        torch.testing.assert_close(found[row : row + 1], alone(input_ids=rows[row : row + 1]).logits)
    assert not torch.equal(fit.experts_LMK[0][0], fit.experts_LMK[0][1]), "the two domains differ here"


@torch.no_grad()
def test_a_named_domain_goes_before_what_the_text_is_like_and_for_one_batch_alone(made: Path) -> None:
    model, fit = fitted(made)
    ids = torch.tensor([TEXTS[0].ids, TEXTS[0].ids, TEXTS[0].ids])
    fit.domains.name_rows(["xyz", None, "unheard of"])
    model(input_ids=ids)
    assert fit.domains.of_row_B.tolist() == [1, 0, 0]
    model(input_ids=ids)
    assert fit.domains.of_row_B.tolist() == [0, 0, 0]


@torch.no_grad()
def test_padding_and_packing_leave_a_texts_domain_alone(made: Path) -> None:
    model, fit = fitted(made)
    padded = torch.tensor([[*TEXTS[0].ids[:10], *[0] * 50]])
    model(input_ids=padded)
    assert fit.domains.of_row_B.tolist() == [0]
    packed = torch.tensor([[*TEXTS[0].ids[:12], *TEXTS[1].ids[:8]]])
    positions = torch.tensor([[*range(12), *range(8)]])
    model.model(input_ids=packed, position_ids=positions, use_cache=False)
    assert fit.domains.of_token_T.tolist() == [0] * 12 + [1] * 8


def test_text_ends_where_its_last_token_only_repeats() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [5, 0, 6, 7], [0, 0, 0, 0]])
    assert text_tokens(ids, None).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert text_tokens(ids, mask).tolist() == mask.bool().tolist()
    assert texts_of(ids, torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [3, 4, 5, 6]])).tolist() == [
        [0, 0, 1, 1],
        [2, 2, 2, 2],
        [3, 3, 3, 3],
    ]


@torch.no_grad()
def test_a_text_that_is_continued_keeps_its_domain(made: Path) -> None:
    model, fit = fitted(made)
    ids = torch.tensor([TEXTS[1].ids])
    first = model(input_ids=ids[:, :-1], use_cache=True)
    assert fit.domains.of_row_B.tolist() == [1]
    last = model(input_ids=torch.tensor([[4]]), past_key_values=first.past_key_values).logits[:, -1]
    assert fit.domains.of_token_T.tolist() == [1]
    fit.domains.name_rows(["xyz"])
    whole = model(input_ids=torch.cat([ids[:, :-1], torch.tensor([[4]])], dim=1)).logits[:, -1]
    torch.testing.assert_close(last, whole)
    with pytest.raises(UsageError, match="needs token ids, not embeddings"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_texts_without_domains_are_clustered_the_same_way_each_time(made: Path) -> None:
    texts = [DomainText(text.ids, None) for text in TEXTS]
    _, fit = fitted(made, texts)
    assert 2 <= len(fit.domains.names) <= min(NUM_CLUSTERS, len(TEXTS))
    assert fit.domains.names[0] == "cluster 1"
    _, again = fitted(made, texts)
    assert [table.tolist() for table in fit.experts_LMK] == [table.tolist() for table in again.experts_LMK]


def test_without_a_choice_there_is_nothing_to_fit(made: Path) -> None:
    model = factorctl.load(made, top_k=6)
    with pytest.raises(UsageError, match="needs a choice between experts"):
        fit_domains(model, TEXTS, 100, list(factored_ffns(model)), teacher_of, seed=0)
