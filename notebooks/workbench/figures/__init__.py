"""Every figure of the workbench: arrays in, a matplotlib or plotly figure out.

One style throughout: letters that can be read at half size, Okabe and Ito's colours (told apart by the
colour-blind, and never the only mark of a difference), axes with units.

Images are PIL images or arrays (H, W, 3); `east_m` and `north_m` are arrays (n,) of metres in one frame;
recalls are percents; NaN means "not run" or "unknown": it is drawn as such, or counted in the title.
"""

# ruff: noqa: F401, I001
# fmt: off
from types import FunctionType

from matplotlib import rc_context

from workbench.figures.graph import (
    affinity_change, graph_histograms, graph_map, greedy_steps, pair_matrices, sampler_comparison,
)
from workbench.figures.maps import (
    dates, distance_histogram, heading_rose, images_per_place, nearest_map, place_map, places_plotly,
    thumbnail_page, tsne_figure, tsne_plotly,
)
from workbench.figures.pictures import (
    contact_sheet, contributions_pair, heatmap_scales, label_map, number_grids,
    patch_match, retrieval_panel, review_page,
)
from workbench.figures.results import (
    ablation_figure, aid_bars, context_audit, graph_cost, loss_curve, mass_bars, methods_compared,
    precision_recall, recall_bars, recall_per_epoch, recall_vs_dim, recall_vs_parameters, sideways_shift,
    training_rates,
)
from workbench.figures.style import PALETTE, RIGHT, STYLE, WRONG, draw

for _name, _value in list(globals().items()):  # draw in one style, and leave matplotlib's as it was
    if isinstance(_value, FunctionType) and _value not in (rc_context, draw):
        globals()[_name] = rc_context(STYLE)(_value)
