"""Soft Probing: equal to its equations, of unit length, whole, and readable patch by patch."""

import numpy as np
import oracles
import pytest
import torch

from sagelib.backbone import DynamicPowerNorm
from sagelib.softp import SoftProbing, SoftWeighting

M, N, GRID = 6, 12, (3, 4)


def small(alpha=0.5, **options):
    torch.manual_seed(3)
    options = {"channels": 5, "probes": 4, "token_dim": 3, "hidden": 7, **options}
    return SoftProbing(M, alpha=alpha, **options).double().eval()


def tokens(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cls = torch.randn(batch, M, generator=generator, dtype=torch.float64)
    return cls, torch.randn(batch, N, M, generator=generator, dtype=torch.float64)


def pair(layer):
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


def layers(model):
    found = {
        "token": [pair(model.token[0]), pair(model.token[2])],
        "reduction": [pair(model.reduction[0]), pair(model.reduction[3])],
        "probe": [pair(model.probe[0]), pair(model.probe[3])],
        "post_dpn": [pair(model.post_dpn.projection[0]), pair(model.post_dpn.projection[3])],
    }
    if model.weighting is not None:
        found["weighting"] = [pair(model.weighting.predictor[0]), pair(model.weighting.predictor[2])]
    return found


@pytest.mark.parametrize("alpha", [0.5, 2.0, None])
def test_equals_the_equations_in_float64(alpha):
    model, (cls, patches) = small(alpha), tokens()
    images = zip(cls.numpy(), patches.numpy(), strict=True)
    expected = np.array([oracles.soft_probing(c, x, layers(model), alpha) for c, x in images])
    out = model(cls, patches, GRID)
    assert out.shape == (2, model.out_dim) == (2, 3 + 5 * 4)
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=1e-12)


def test_power_norm_equals_its_equation_in_float64():
    torch.manual_seed(0)
    norm = DynamicPowerNorm(M, 4).double().eval()
    x = torch.randn(3, 5, M, dtype=torch.float64)
    x[0, 0, 0] = 0.0
    layers = pair(norm.projection[0]), pair(norm.projection[3])
    expected = np.array([oracles.power_norm(rows, *layers) for rows in x.numpy()])
    torch.testing.assert_close(norm(x), torch.tensor(expected), rtol=0, atol=1e-12)


def test_power_norm_is_float32_and_its_gradient_finite_near_zero():
    norm = DynamicPowerNorm(M)
    x = (
        torch.tensor([0.0, 1e-30, -1e-12, 1e-6, -1.0, 50.0])
        .expand(1, 2, M)
        .to(torch.bfloat16)
        .requires_grad_()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    grads = [x.grad, *(p.grad for p in norm.parameters())]
    assert all(torch.isfinite(g).all() for g in grads)
    # Just beside zero the slope is p * epsilon ** (p - 1) + 1, some hundreds.
    assert 100 < x.grad[0, 0, 1] < 5000


def test_weighting_has_385_parameters_and_stays_in_its_range():
    weighting = SoftWeighting(0.5)
    assert sum(p.numel() for p in weighting.parameters()) == 385
    beta = weighting(torch.randn(2, 50, M) * torch.logspace(-4, 4, 50)[:, None])
    assert beta.shape == (2, 50) and (beta > 0).all() and (beta <= 0.5).all()


def test_off_is_the_same_model_without_weights():
    on, off = small(0.5), small(None)
    off.load_state_dict({k: v for k, v in on.state_dict().items() if not k.startswith("weighting")})
    on.weighting.forward = lambda patches: patches.new_zeros(patches.shape[:2])
    cls, patches = tokens()
    torch.testing.assert_close(on(cls, patches, GRID), off(cls, patches, GRID), rtol=0, atol=0)
    assert torch.equal(off.patch_weights(patches), torch.zeros(2, N, dtype=torch.float64))


def test_patch_weights_and_probe_maps_are_those_of_the_equations():
    model, (_, patches) = small(), tokens()
    beta, maps = model.patch_weights(patches).detach(), model.probe_maps(patches, GRID).detach()
    found = layers(model)
    for i, x in enumerate(patches.numpy()):
        expected = oracles.soft_weights(x, *found["weighting"], 0.5)
        torch.testing.assert_close(beta[i], torch.tensor(expected), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            maps[i].flatten(1).T,
            torch.tensor(oracles.probe_maps(x, expected, found["probe"])),
            rtol=0,
            atol=1e-12,
        )
    assert maps.shape == (2, 4, *GRID)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))


def test_the_order_of_the_patches_does_not_matter():
    model, (cls, patches) = small(), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(cls, patches[:, order]), model(cls, patches), rtol=0, atol=1e-12)


def test_a_cell_is_the_method_on_its_own_patches():
    model, (cls, patches) = small(cells=2), tokens()
    whole = small()
    whole.load_state_dict(model.state_dict())
    out = model(cls, patches, GRID).detach()
    assert out.shape == (2, model.out_dim) == (2, 3 + 5 * 4 * 4)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2, dtype=torch.float64))
    # A shift that all patches share goes by the mean over the whole picture.
    centred = whole.reduction(whole._weighted(patches)).mean((1, 2), keepdim=True).detach()
    number, parts = np.arange(N).reshape(GRID), []
    for band in (number[:2], number[2:]):
        for cell in (band[:, :2], band[:, 2:]):
            x = whole._weighted(patches)[:, cell.ravel()]
            grams = (whole.reduction(x) - centred).transpose(1, 2) @ whole.probe(x).softmax(1) / cell.size
            parts.append(torch.nn.functional.normalize(whole.post_dpn(grams), dim=1).flatten(1))
    token = torch.nn.functional.normalize(whole.token(cls), dim=1)
    expected = torch.nn.functional.normalize(torch.cat([token, *parts], 1), dim=1).detach()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    maps = model.probe_maps(patches, GRID)
    torch.testing.assert_close(maps[:, :, :2, 2:].sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 x 2 cells need a grid"):
        model(cls, patches)


def test_standardised_lengths_keep_the_gate_open_where_plain_ones_saturate_it():
    patches = torch.randn(4, 50, 680, generator=torch.Generator().manual_seed(0))
    patches *= torch.linspace(0.6, 1.4, 50)[:, None]
    spread = {}
    for standardise in (False, True):
        model = SoftProbing(680, channels=4, probes=3, token_dim=2, standardise=standardise)
        gate = model.weighting
        with torch.no_grad():  # predictor(s) = relu(s)
            for layer, value in ((gate.predictor[0], 1.0), (gate.predictor[2], 1 / 128)):
                layer.weight.fill_(value)
                layer.bias.zero_()
        model.initialise_from(iter(patches.split(1)))
        low, high = model.patch_weights(patches).detach().aminmax()
        spread[standardise] = high - low
    lengths = patches.norm(dim=-1)
    standard = (lengths - lengths.mean()) / lengths.std()
    torch.testing.assert_close(gate(patches), 0.5 * standard.relu().sigmoid(), rtol=1e-4, atol=1e-4)
    assert spread[False] < 1e-5 < 0.1 < spread[True]
    assert [n for n, _ in SoftWeighting(0.5).named_buffers()] == []


@pytest.mark.parametrize("cells", [1, 2])
def test_contributions_add_up_to_the_score_and_are_its_linear_part(cells):
    model, (cls, patches) = small(cells=cells), tokens(4)
    ours = model(cls, patches, GRID).detach()
    other = ours.roll(1, 0)
    contributions = model.patch_contributions(cls, patches, GRID, other)
    token_part = (ours[:, : model.token_dim] * other[:, : model.token_dim]).sum(1)
    assert contributions.shape == (4, N)
    torch.testing.assert_close(contributions.sum(1) + token_part, (ours * other).sum(1), rtol=0, atol=1e-12)
    # One descriptor for all images is taken too.
    torch.testing.assert_close(
        model.patch_contributions(cls, patches, GRID, other[0])[0], contributions[0], rtol=0, atol=1e-14
    )


def test_contribution_of_a_patch_that_no_probe_looks_at_is_zero():
    model, (cls, patches) = small(), tokens(1)
    with torch.no_grad():
        # The probes' scores follow the first coordinate of the hidden layer; one patch is driven far below.
        model.probe[0].weight.zero_()
        model.probe[0].weight[0, 0] = 1.0
        model.probe[0].bias.fill_(1000.0)
        model.probe[3].weight.zero_()
        model.probe[3].weight[:, 0] = 1.0
        patches[:, 5, 0] = -500.0
    shares = model.patch_contributions(cls, patches, GRID, model(cls, patches))[0]
    assert abs(shares[5]) < 1e-12 < shares.abs().max()


def test_initialisation_centres_and_scales_both_branches():
    model, (cls, patches) = small(dropout=0.3).train(), tokens(40)
    with torch.no_grad():
        before = model.eval()(cls, patches)
        model.train().initialise_from(patches.split(16))
        assert model.training
        model.eval()
        weighted = patches * (1 + model.patch_weights(patches))[..., None]
        for branch in (model.reduction, model.probe):
            out = branch(weighted).flatten(0, 1)
            torch.testing.assert_close(out.mean(0), torch.zeros_like(out[0]), rtol=0, atol=1e-9)
            torch.testing.assert_close(out.std(0, correction=0), torch.ones_like(out[0]), rtol=0, atol=1e-9)
        after = model(cls, patches)
    # Untrained descriptors of unrelated images are less alike than before.
    off_diagonal = ~torch.eye(40, dtype=torch.bool)
    assert (after @ after.T)[off_diagonal].mean() < (before @ before.T)[off_diagonal].mean() - 0.1
    with pytest.raises(ValueError, match="at least one image"):
        model.initialise_from([])


def test_dropout_is_an_option_and_silent_in_evaluation():
    cls, patches = tokens()
    model = small(dropout=0.9, norm_dropout=0.0).train()
    assert not torch.equal(model(cls, patches), model(cls, patches))
    model = small(dropout=0.0, norm_dropout=0.0).train()
    assert torch.equal(model(cls, patches), model.eval()(cls, patches))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, "alpha must be a number above 0, got 0.0"),
        ({"dropout": 1.0}, "dropout must be a number from 0"),
        ({"probes": 0}, "probes must be a whole number of at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SoftProbing(M, **options)
