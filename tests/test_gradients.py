import pytest
import torch

from research.theory.expected_squares import expected_squares
from rest_rl.evaluate.shared_attention import can_share
from rest_rl.loss import clipped_surrogate
from rest_rl.probe.gradients import (
    Coordinates,
    compute_response_logits,
    compute_token_statistics,
    compute_weighted_gradients,
    pad_responses,
)
from tests.test_shared_prompts import count_tokens
from tests.tiny_policy import tiny_model, tiny_tokenizer

PROMPT = [5, 9, 2]
RESPONSES = [[4, 4, 7, 1], [3], [8, 2]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny_model(tiny_tokenizer()).double()
    model.set_attn_implementation(request.param)
    assert can_share(model) == (request.param == "sdpa")
    return model


def row_by_row_logps(model, prompt, responses):
    """log pi of each token without padding or batching: the definition."""
    rows = []
    for response in responses:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1)[range(len(response)), response])
    return rows


def flat_gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(grads, model.parameters(), strict=True)]
    )


def test_gradients_match_the_reference_loss(model):
    weights_BT = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages_B = torch.tensor([1.5, -0.5, -1.0], dtype=torch.float64)
    _, mask_BT = pad_responses(RESPONSES)
    lengths_B1 = mask_BT.sum(-1, keepdim=True)
    logps_BT = torch.zeros(3, 4, dtype=torch.float64)
    for row, logps in enumerate(row_by_row_logps(model, PROMPT, RESPONSES)):
        logps_BT = logps_BT.index_put(
            (torch.full((len(logps),), row), torch.arange(len(logps))), logps, accumulate=True
        )
    loss = clipped_surrogate(logps_BT, logps_BT.detach(), advantages_B[:, None] * weights_BT, mask_BT)
    expected = -flat_gradient(loss, model).float()
    ours = compute_weighted_gradients(
        model,
        PROMPT,
        RESPONSES,
        (advantages_B[:, None] * weights_BT / (3 * lengths_B1))[None],
        Coordinates.choose(model, None),
    )
    assert ours.shape == (1, sum(p.numel() for p in model.parameters()))
    assert expected.norm() > 0.01
    torch.testing.assert_close(ours[0], expected, rtol=1e-5, atol=1e-7)


def test_gradients_are_linear_in_the_weights_and_ignore_padding(model):
    coordinates = Coordinates.choose(model, None)
    weights_BT = torch.arange(12.0).reshape(3, 4) - 5
    doubled, at_padding = 2 * weights_BT, weights_BT.clone()
    at_padding[1, 1:] = 99
    one, two, three, none = compute_weighted_gradients(
        model,
        PROMPT,
        RESPONSES,
        torch.stack([weights_BT, doubled, at_padding, torch.zeros(3, 4)]),
        coordinates,
    )
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(three, one)
    assert not none.any()
    parts = sum(
        compute_weighted_gradients(model, PROMPT, [row], weights_BT[None, i : i + 1, : len(row)], coordinates)
        for i, row in enumerate(RESPONSES)
    )
    torch.testing.assert_close(parts[0], one, rtol=1e-5, atol=1e-5)  # added up in float32


def test_a_shared_prompt_is_computed_once(model):
    counts = count_tokens(model)
    compute_token_statistics(model, PROMPT, RESPONSES)
    # each response begins with the prompt's last token and ends before its own
    assert sum(counts) == (2 + 4 + 1 + 2 if can_share(model) else 3 * (3 + 4))


def test_the_model_stays_unchanged(model):
    model.train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    compute_weighted_gradients(model, PROMPT, RESPONSES, torch.ones(1, 3, 4), Coordinates.choose(model))
    compute_token_statistics(model, PROMPT, RESPONSES)
    assert model.training
    assert model.lm_head.weight.grad.eq(1).all()
    assert model.model.embed_tokens.weight.grad is None
    model.lm_head.weight.grad = None


def test_kept_coordinates_are_entries_of_the_whole_vector(model):
    whole = compute_weighted_gradients(model, PROMPT, RESPONSES, torch.ones(1, 3, 4), Coordinates.choose(model, None))
    some = Coordinates.choose(model, 1000, seed=3)
    part = compute_weighted_gradients(model, PROMPT, RESPONSES, torch.ones(1, 3, 4), some)
    assert some.size == 1000
    assert some.scale == whole.shape[1] / 1000
    assert torch.equal(part[0], whole[0, some.indices_N])


def test_inner_products_of_kept_coordinates_are_unbiased():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(2, 4, bias=False))  # 15 + 5 + 8 = 28 entries
    a, b = torch.arange(28.0) - 9, torch.arange(28.0) ** 2
    products = []
    for seed in range(4000):
        chosen = Coordinates.choose(layer, 7, seed)
        split = [part.reshape(-1) for part in a.split([15, 5, 8])], [part.reshape(-1) for part in b.split([15, 5, 8])]
        products.append(float(chosen.scale * chosen.gather(split[0]) @ chosen.gather(split[1])))
    values = torch.tensor(products, dtype=torch.float64)
    assert abs(values.mean() - a @ b) < 4 * values.std() / len(values) ** 0.5


def test_statistics_do_not_depend_on_the_batch(model):
    logps_BT, entropies_BT, collisions_BT = compute_token_statistics(model, PROMPT, RESPONSES)
    for row, (response, expected) in enumerate(zip(RESPONSES, row_by_row_logps(model, PROMPT, RESPONSES), strict=True)):
        length = len(response)
        torch.testing.assert_close(logps_BT[row, :length], expected.detach())
        p = model(torch.tensor([[*PROMPT, *response]])).logits[0, len(PROMPT) - 1 : -1].softmax(-1)
        torch.testing.assert_close(entropies_BT[row, :length], -(p * p.log()).sum(-1).detach())
        torch.testing.assert_close(collisions_BT[row, :length], 1 - p.square().sum(-1).detach())
        assert not logps_BT[row, length:].any()
        assert not entropies_BT[row, length:].any()


def test_the_score_of_the_logits_is_e_y_minus_p(model):
    # The head of the tiny model is untied: its gradient is (e_y - p) h^T, whose squared norm is |e_y - p|^2 |h|^2.
    ids_BT, mask_BT = pad_responses([[4]])
    p = compute_response_logits(model, PROMPT, ids_BT, mask_BT)[0, 0].softmax(-1).detach()
    hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1].detach()
    others = [q for q in model.parameters() if q is not model.lm_head.weight]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        vector = compute_weighted_gradients(model, PROMPT, [[4]], torch.ones(1, 1, 1), Coordinates.choose(model, None))
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
    score = -p
    score[4] += 1
    expected = score.square().sum() * hidden.square().sum()
    torch.testing.assert_close(vector.double().square().sum(), expected, rtol=1e-5, atol=0)


def test_responses_without_tokens_have_no_gradient(model):
    assert not compute_weighted_gradients(model, PROMPT, [[], []], torch.ones(2, 2, 0), Coordinates.choose(model)).any()
    assert compute_token_statistics(model, PROMPT, [[]]).logps_BT.shape == (1, 0)


def test_errors_quote_the_wrong_value(model):
    coordinates = Coordinates.choose(model)
    with pytest.raises(ValueError, match=r"weights are \(1, 3, 5\)"):
        compute_weighted_gradients(model, PROMPT, RESPONSES, torch.ones(1, 3, 5), coordinates)
    with pytest.raises(ValueError, match="another model"):
        compute_weighted_gradients(model, PROMPT, RESPONSES, torch.ones(1, 3, 4), Coordinates((3,), torch.arange(3)))
    with pytest.raises(ValueError, match="prompt is empty"):
        compute_token_statistics(model, [], RESPONSES)
    with pytest.raises(ValueError, match="no responses"):
        pad_responses([])
    with pytest.raises(ValueError, match="limit is 0"):
        Coordinates.choose(model, 0)
    with pytest.raises(ValueError, match="no trainable parameters"):
        Coordinates.choose(torch.nn.Identity())


def test_expected_squares_average_over_all_next_tokens(model):
    # Exactly: sum over the vocabulary of p_y |grad log p_y|^2, at both positions of a response.
    coordinates = Coordinates.choose(model, None)
    response, exact = [4, 7], torch.zeros(2, dtype=torch.float64)
    for t in (0, 1):
        logits = model(torch.tensor([[*PROMPT, *response[:t]]])).logits[0, -1].detach()
        for y, p in enumerate(logits.softmax(-1).tolist()):
            if p > 1e-4:
                weights = torch.zeros(1, 1, t + 1)
                weights[0, 0, t] = 1
                vector = compute_weighted_gradients(model, PROMPT, [[*response[:t], y]], weights, coordinates)[
                    0
                ].double()
                exact[t] += p * vector.square().sum()
    draws = torch.stack([expected_squares(model, PROMPT, response, coordinates, seed) for seed in range(40)])
    error = draws.std(0) / 40**0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error + 0.02 * exact).all()
    assert (draws >= 0).all()
    assert expected_squares(model, PROMPT, [], coordinates).shape == (0,)
