"""The cross-image head: equal to its equations and to torch's own encoder, and its context what it says."""

import numpy as np
import oracles
import pytest
import torch

from sagelib.interact import InteractHead

WIDTH, SEGMENT, HEADS = 24, 8, 2


def small(**options):
    torch.manual_seed(1)
    head = InteractHead(WIDTH, segment_width=SEGMENT, heads=HEADS, ffn=12, **options).double().eval()
    with torch.no_grad():  # torch starts these at zero and one, where mistakes hide
        for name, p in head.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return head


def rows(n, seed=0):
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def layers(head):
    def pair(module):
        return module.weight.detach().numpy(), module.bias.detach().numpy()

    return [
        {
            "in_proj": (
                layer.self_attn.in_proj_weight.detach().numpy(),
                layer.self_attn.in_proj_bias.detach().numpy(),
            ),
            "out_proj": pair(layer.self_attn.out_proj),
            **{name: pair(getattr(layer, name)) for name in ("linear1", "linear2", "norm1", "norm2")},
        }
        for layer in head.layers
    ]


def test_over_the_batch_equals_the_equations_in_float64():
    head, x = small(), rows(4)
    expected = oracles.interact_batch(x.numpy(), layers(head), SEGMENT, HEADS)
    torch.testing.assert_close(head(x), torch.tensor(expected), rtol=0, atol=1e-12)


def test_over_anchors_equals_the_equations_in_float64():
    head, x, anchors = small(), rows(3), rows(5, seed=9)
    parts = layers(head)
    expected = np.array(
        [oracles.interact_anchors(d, anchors.numpy(), parts, SEGMENT, HEADS) for d in x.numpy()]
    )
    torch.testing.assert_close(head(x, anchors), torch.tensor(expected), rtol=0, atol=1e-12)


def test_equals_torchs_encoder_and_has_its_names():
    head, x = (
        InteractHead(WIDTH, segment_width=SEGMENT, heads=HEADS, ffn=12, layers=2).eval(),
        rows(5).float(),
    )
    layer = torch.nn.TransformerEncoderLayer(SEGMENT, HEADS, 12, 0.1, activation="gelu")
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    encoder.load_state_dict(head.state_dict(), strict=True)
    expected = torch.cat([encoder(part) for part in x.split(SEGMENT, dim=1)], dim=1)
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-5)


def test_released_size_has_7880192_parameters():
    with torch.device("meta"):
        head = InteractHead(8448)
    assert head.segments == 11
    assert sum(p.numel() for p in head.parameters()) == 7_880_192


@pytest.mark.parametrize("m", [0, 1, 7])
def test_with_anchors_it_does_not(m):
    head, x, anchors = small(), rows(6), rows(m, seed=4)
    whole = head(x, anchors)
    parts = torch.cat([head(x[:1], anchors), head(x[1:4], anchors), head(x[4:], anchors)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    torch.testing.assert_close(head(x[order], anchors), whole[order], rtol=0, atol=1e-12)


def test_no_anchors_at_all_is_an_image_alone():
    head, x = small(), rows(4)
    alone = torch.cat([head(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(head(x, x.new_zeros(0, WIDTH)), alone, rtol=0, atol=1e-12)


def test_anchors_matter_and_their_order_does_not():
    head, x, anchors = small(), rows(4), rows(5, seed=2)
    out = head(x, anchors)
    assert (out - head(x, rows(5, seed=3))).abs().max() > 1e-3
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(head(x, anchors[order]), out, rtol=0, atol=1e-12)


def test_one_anchor_equal_to_the_image_is_a_batch_of_two_copies():
    head, x = small(), rows(1)
    torch.testing.assert_close(head(x, x), head(x.repeat(2, 1))[:1], rtol=0, atol=1e-12)


def test_learned_anchors_get_gradients():
    head = small(learned_anchors=3)
    assert head.anchors.shape == (3, WIDTH)
    head(rows(2), head.anchors).square().mul(torch.arange(WIDTH)).sum().backward()
    assert (head.learned.grad.abs().sum(1) > 0).all()


def test_stored_anchors_are_saved_with_the_head():
    head, anchors = small(stored_anchors=3), rows(3, seed=7)
    head.set_anchors(anchors)
    again = small(stored_anchors=3)
    again.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(again.anchors, anchors)
    assert small().anchors is None
    with pytest.raises(ValueError, match="learns its anchors"):
        small(learned_anchors=2).set_anchors(anchors)
    with pytest.raises(ValueError, match=r"shape \(n, 24\); got \(3, 7\)"):
        head.set_anchors(anchors[:, :7])


@pytest.mark.parametrize("context", ["batch", "anchors"])
def test_only_the_key_bias_that_softmax_cancels_has_no_gradient(context):
    head = small().train()
    for module in head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x, anchors = rows(5), rows(4, seed=1) if context == "anchors" else None
    target = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (head(x, anchors) * target).sum().backward()
    for name, p in head.named_parameters():
        if name.endswith("in_proj_bias"):
            query, key, value = p.grad.chunk(3)
            assert key.abs().max() < 1e-12 < min(query.abs().max(), value.abs().max())
        else:
            assert p.grad.abs().max() > 1e-9, name


def test_alone_queries_and_keys_get_no_gradient():
    head = small()
    x = rows(3)
    target = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (head(x, x.new_zeros(0, WIDTH)) * target).sum().backward()
    for layer in head.layers:
        query, key, value = layer.self_attn.in_proj_weight.grad.chunk(3)
        assert query.abs().max() < 1e-12 and key.abs().max() < 1e-12 < value.abs().max()


def test_output_is_not_brought_to_unit_length():
    assert (small()(rows(3)).norm(dim=1) > 1.5).all()


def test_widths_that_do_not_divide_are_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"4096 = 5 x 768 \+ 256; segment_width could be 256, 512, 1024"):
        InteractHead(4096)
    with pytest.raises(ValueError, match=r"768 = 109 x 7 \+ 5"):
        InteractHead(8448, heads=7)
    with pytest.raises(ValueError, match="one of learned_anchors, stored_anchors"):
        small(learned_anchors=1, stored_anchors=1)
    with pytest.raises(ValueError, match=r"descriptors must have shape \(n, 24\); got \(3, 25\)"):
        small()(torch.zeros(3, 25, dtype=torch.float64))
    with torch.device("meta"):
        assert InteractHead(4096, segment_width=512).segments == 8
