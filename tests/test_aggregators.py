"""The comparators: equal to slow float64 versions of their papers' equations, and well-behaved as modules."""

import math

import numpy as np
import oracles_aggregators as oracle
import pytest
import torch

from sagelib.aggregators import SALAD, GeM, Mean, NetVLAD, build_aggregator, log_sinkhorn

WIDTH, GRID = 12, (4, 5)
SMALL = {
    "cls": {},
    "mean": {},
    "gem": {},
    "netvlad": {"clusters": 3},
    "salad": {"clusters": 5, "channels": 4, "token_dim": 6, "hidden": 10},
    "mixvpr": {"grid": GRID, "depth": 2, "channels": 7, "rows": 3},
    "boq": {"channels": 8, "queries": 4, "layers": 2, "rows": 3, "heads": 2},
}
MORE = [
    ("gem", {"grid": 2}),
    ("gem", {"dim": 9}),
    ("netvlad", {"clusters": 3, "channels": 5}),
]
ALL = [*SMALL.items(), *MORE]


def tokens(seed=0, batch=3, grid=GRID, width=WIDTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    cls = torch.randn(batch, width, generator=generator, dtype=dtype)
    return cls, torch.randn(batch, grid[0] * grid[1], width, generator=generator, dtype=dtype), grid


def made(name, options, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_aggregator(name, WIDTH, **options)


@pytest.mark.parametrize("name, options", ALL)
def test_unit_norm_stated_width_and_a_state_that_travels(name, options):
    module, other = made(name, options).eval(), made(name, options, seed=1).eval()
    cls, patches, grid = tokens()
    out = module(cls, patches, grid)
    assert out.shape == (3, module.out_dim)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))
    # An image does not see its batch.
    alone = torch.cat([module(cls[i : i + 1], patches[i : i + 1], grid) for i in range(3)])
    torch.testing.assert_close(out, alone, atol=1e-6, rtol=1e-5)
    other.load_state_dict(module.state_dict(), strict=True)
    torch.testing.assert_close(other(cls, patches, grid), out, rtol=0, atol=0)


@pytest.mark.parametrize("name, options", ALL)
def test_every_parameter_and_input_gets_a_finite_gradient(name, options):
    module = made(name, options).eval()
    cls, patches, grid = tokens()
    cls.requires_grad_(), patches.requires_grad_()
    target = torch.randn(3, module.out_dim, generator=torch.Generator().manual_seed(5))
    (module(cls, patches, grid) * target).sum().backward()
    sizes = {key: parameter.grad.abs().max() for key, parameter in module.named_parameters()}
    for key, size in sizes.items():
        # Sinkhorn scales columns first, and so takes back what is added to all scores of one.
        cancelled = name == "salad" and key in ("dustbin", "scores.3.bias")
        share = size / max(sizes.values())  # False for a NaN
        assert (share < 1e-6) if cancelled else (1e-6 < share <= 1), key
    read = {"cls": [cls], "salad": [cls, patches]}.get(name, [patches])
    for tensor in read:
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0


@pytest.mark.parametrize("name, options", ALL)
def test_order_of_the_patches(name, options):
    """Only the aggregators that know a patch's position may notice a permutation; and those must."""
    module = made(name, options).eval()
    cls, patches, grid = tokens()
    order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(3))
    change = (module(cls, patches, grid) - module(cls, patches[:, order], grid)).abs().max()
    positional = name in ("mixvpr", "boq") or options.get("grid") == 2
    assert change > 1e-3 if positional else change < 1e-5


def test_gem_equals_the_oracle():
    cls, patches, grid = tokens(dtype=torch.float64)
    for options in ({}, {"p": 1.7}, {"grid": 2}, {"grid": 3}):
        out = GeM(WIDTH, **options).double()(cls, patches, grid).detach().numpy()
        for i in range(3):
            expected = oracle.gem(patches[i].numpy(), grid, options.get("p", 3.0), options.get("grid", 1))
            np.testing.assert_allclose(out[i], expected, atol=1e-6)


def test_gem_is_the_mean_at_one_and_nears_the_maximum():
    cls, patches, grid = tokens(dtype=torch.float64)
    positive = patches.abs() + 0.1
    torch.testing.assert_close(
        GeM(WIDTH, p=1.0).double()(cls, positive, grid), Mean(WIDTH)(cls, positive, grid)
    )
    peak = torch.nn.functional.normalize(positive.amax(dim=1), dim=1)
    torch.testing.assert_close(GeM(WIDTH, p=400.0).double()(cls, positive, grid), peak, atol=5e-3, rtol=0)


def test_gem_of_an_all_zero_image_is_finite():
    """A black picture may give zero features: the descriptor and its gradient stay finite."""
    patches = torch.zeros(1, 20, WIDTH, requires_grad=True)
    out = GeM(WIDTH)(torch.zeros(1, WIDTH), patches, GRID)
    out.sum().backward()
    assert out.isfinite().all() and patches.grad.isfinite().all()


def test_netvlad_equals_the_oracle():
    cls, patches, grid = tokens(dtype=torch.float64)
    for options in ({"clusters": 3}, {"clusters": 4, "channels": 5}):
        module = made("netvlad", options).double()
        out = module(cls, patches, grid).detach().numpy()
        for i in range(3):
            np.testing.assert_allclose(out[i], oracle.netvlad(module, patches[i].numpy()), atol=1e-10)


def test_netvlad_start_is_as_sharp_as_asked():
    _, patches, _ = tokens(batch=20, dtype=torch.float64)
    flat = patches.reshape(-1, WIDTH)
    module = made("netvlad", {"clusters": 6}).double()
    alpha = module.initialise_from(patches.split(5))
    inner = torch.nn.functional.normalize(flat, dim=1)
    soft = module.assign(inner).softmax(dim=1)
    top = soft.topk(2, dim=1).values
    ratio = (top[:, 0] / top[:, 1]).log().mean().item()
    assert math.isclose(ratio, math.log(100.0), rel_tol=1e-6)
    # the softmax is over -alpha ||x - c||^2, so the heaviest centre is the nearest one
    assert torch.equal(soft.argmax(dim=1), torch.cdist(inner, module.centres).argmin(dim=1))
    distances = torch.cdist(inner, module.centres).square()
    torch.testing.assert_close(soft, (-alpha * distances).softmax(dim=1))


def test_netvlad_needs_more_patches_than_clusters():
    with pytest.raises(ValueError, match="3 clusters cannot start from 2 patches"):
        NetVLAD(WIDTH, clusters=3).initialise_from([torch.zeros(1, 2, WIDTH)])


def test_sinkhorn_equals_multiplication_and_reaches_its_sums():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    rows, columns = (
        torch.ones(7, dtype=torch.float64),
        torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64),
    )
    for iterations in (1, 3, 200):
        plan = log_sinkhorn(scores, rows.log(), columns.log(), iterations).exp()
        for i in range(2):
            np.testing.assert_allclose(
                plan[i], oracle.sinkhorn(scores[i], rows, columns, iterations), rtol=1e-9
            )
        torch.testing.assert_close(plan.sum(dim=2), rows.expand(2, 7))
    torch.testing.assert_close(plan.sum(dim=1), columns.expand(2, 4))


def test_sinkhorn_survives_scores_whose_exponential_does_not():
    scores = 300.0 * torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    plan = log_sinkhorn(scores, torch.zeros(6), torch.tensor([1.0, 1.0, 4.0]).log(), 50)
    assert plan.exp().isfinite().all()
    torch.testing.assert_close(plan.exp().sum(dim=2), torch.ones(1, 6))


def test_salad_equals_the_oracle():
    cls, patches, grid = tokens(dtype=torch.float64)
    module = made("salad", SMALL["salad"]).double().eval()
    out = module(cls, patches, grid).detach().numpy()
    for i in range(3):
        expected = oracle.salad(module, cls[i].numpy(), patches[i].numpy())
        np.testing.assert_allclose(out[i], expected, atol=2e-6)  # its transport runs in float32


def test_salad_mass_and_dustbin():
    module = made("salad", SMALL["salad"]).eval()
    _, patches, _ = tokens()
    mass = module.assignment(patches)
    assert mass.shape == (3, 20, 5) and (mass > 0).all() and (mass.sum(dim=2) < 1).all()
    module.iterations = 500
    torch.testing.assert_close(module.assignment(patches).sum(dim=1), torch.ones(3, 5), atol=1e-4, rtol=0)


def test_salad_refuses_fewer_patches_than_clusters():
    with pytest.raises(ValueError, match="more patches than clusters, got 20 patches for 20 clusters"):
        SALAD(WIDTH, clusters=20).eval()(*tokens())


def test_mixvpr_equals_the_oracle():
    cls, patches, grid = tokens(dtype=torch.float64)
    module = made("mixvpr", SMALL["mixvpr"]).double()
    out = module(cls, patches, grid).detach().numpy()
    for i in range(3):
        np.testing.assert_allclose(out[i], oracle.mixvpr(module, patches[i].numpy()), atol=1e-10)


def test_mixvpr_reads_its_own_grid_only():
    module = made("mixvpr", SMALL["mixvpr"])
    with pytest.raises(ValueError, match="built for a grid of 4 x 5 patches and got 5 x 4"):
        module(*tokens(grid=(5, 4)))


@pytest.mark.parametrize("training", [False, True])
def test_boq_equals_the_oracle(training):
    cls, patches, grid = tokens(batch=2, dtype=torch.float64)
    module = made("boq", SMALL["boq"]).double().train(training)
    out = module(cls, patches, grid).detach().numpy()
    for i in range(2):
        np.testing.assert_allclose(out[i], oracle.boq(module, patches[i].numpy(), grid, heads=2), atol=1e-9)


def test_dropout_acts_in_training_only():
    module = made("salad", SMALL["salad"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = module.train()(*tokens()), module(*tokens())
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(module.eval()(*tokens()), module(*tokens()), rtol=0, atol=0)


def test_parameter_counts_of_the_papers_sizes():
    """Counted by hand from the layer sizes, for a ViT-B's width of 768."""

    def count(name, **options):
        return sum(p.numel() for p in build_aggregator(name, 768, **options).parameters())

    assert count("cls") == count("mean") == 0
    assert count("gem") == 1
    assert count("netvlad") == 64 * 768 + 64 + 64 * 768
    # 1.4 M, as the paper says of its head
    assert (
        count("salad") == 3 * (768 * 512 + 512) + 512 * (64 + 128 + 256) + (64 + 128 + 256) + 1 == 1_411_009
    )
    n = 16 * 16
    mixer = 2 * n + 2 * (n * n + n)
    assert count("mixvpr", grid=(16, 16)) == 4 * mixer + 768 * 1024 + 1024 + n * 4 + 4
    c = 384
    attend = 4 * c * c + 4 * c
    layer = (attend + 8 * c * c + 5 * c + 4 * c) + 64 * c + 2 * attend + 4 * c
    assert count("boq") == 768 * 9 * c + c + 2 * c + 2 * layer + 128 * 32 + 32


def test_widths_of_the_papers_sizes():
    assert build_aggregator("netvlad", 512).out_dim == 32768
    assert build_aggregator("salad", 768).out_dim == 8448
    assert build_aggregator("mixvpr", 1024, grid=(20, 20)).out_dim == 4096
    assert build_aggregator("boq", 768).out_dim == 12288


def test_cfp_is_soft_probing_without_its_weighting():
    soft, plain = build_aggregator("softp", WIDTH), build_aggregator("cfp", WIDTH)

    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert soft.out_dim == plain.out_dim == 8448
    assert count(soft) - count(plain) == 385
    with pytest.raises(ValueError, match="multiple values for .* 'alpha'"):
        build_aggregator("cfp", WIDTH, alpha=0.5)


@pytest.mark.parametrize("name, options", [pair for pair in ALL if pair[0] not in ("boq", "mixvpr")])
def test_contributions_of_the_patches_add_up_to_the_score(name, options):
    module = made(name, options).double().eval()
    cls, patches, grid = tokens(dtype=torch.float64)
    other = torch.nn.functional.normalize(
        torch.randn(module.out_dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64), dim=0
    )
    with torch.no_grad():
        given = module.patch_contributions(cls, patches, grid, other)
        assert given.shape == (3, 20)
        rest = torch.zeros(3, dtype=torch.float64)
        if name == "cls":
            assert not given.any()
            return
        if name == "salad":
            start = module.token[-1].out_features
            rest = module(cls, patches, grid)[:, :start] @ other[:start]
        if options.get("dim"):  # all but the bias
            module.project.bias.zero_()
            given = module.patch_contributions(cls, patches, grid, other)
        torch.testing.assert_close(
            given.sum(1) + rest, module(cls, patches, grid) @ other, atol=1e-6, rtol=1e-6
        )


def test_a_patch_that_says_nothing_contributes_nothing():
    cls, patches, grid = tokens(dtype=torch.float64)
    patches[:, 7] = 0
    given = Mean(WIDTH).patch_contributions(cls, patches, grid, torch.ones(WIDTH, dtype=torch.float64))
    assert given[:, 7].abs().max() < 1e-9 < given.abs().amax(dim=1).min()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vlad", {}, "aggregator must be one of cls, mean, gem.*got 'vlad'"),
        ("gem", {"cluster": 3}, "'cluster'; gem has p, grid, dim"),
        ("mixvpr", {}, "missing .* 'grid'"),
        ("gem", {"p": 0}, "p must be a number above 0, got 0"),
        ("gem", {"grid": 0}, "grid must be a whole number of at least 1, got 0"),
        ("gem", {"dim": 0}, "dim must be a whole number of at least 1, or None, got 0"),
        ("salad", {"token_dim": -1}, "token_dim must be a whole number"),
        ("mixvpr", {"grid": (4,)}, "grid must be a height and a width"),
        ("boq", {"channels": 10, "heads": 3}, "multiple of heads, got 10 and 3"),
    ],
)
def test_names_and_values_are_refused_in_a_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_aggregator(name, WIDTH, **options)
