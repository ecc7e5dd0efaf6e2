"""Every figure of the workbench: arrays in, a matplotlib or plotly figure out.

No function here reads data, writes a file, shows anything, or knows models and training. One style
throughout: letters that can be read at half size, Okabe and Ito's colours (told apart by the colour-blind,
and never the only mark of a difference), axes with units. A figure that ends a notebook cell is drawn under
it.

Images are PIL images or arrays (H, W, 3); `east_m` and `north_m` are arrays (n,) of metres in one frame;
recalls are percents; NaN means "not run" or "unknown": it is drawn as such, or counted in the title.
"""

# ruff: noqa: F401
from workbench.figures.descriptors import aid_bars, thumbnail_page, tsne_figure, tsne_plotly
from workbench.figures.graph import (
    graph_change,
    graph_histograms,
    graph_map,
    greedy_steps,
    pair_matrices,
    sampler_comparison,
)
from workbench.figures.heatmaps import (
    contributions_pair,
    heatmap_overlay,
    label_map,
    mass_bars,
    number_grids,
    patch_match,
)
from workbench.figures.maps import (
    dates,
    distance_histogram,
    heading_rose,
    images_per_place,
    nearest_map,
    place_map,
    places_plotly,
)
from workbench.figures.photographs import contact_sheet, retrieval_panel, review_page
from workbench.figures.style import PALETTE, RIGHT, WRONG, to_png
from workbench.figures.tables import (
    ablation_figure,
    context_audit,
    graph_cost,
    recall_bars,
    recall_vs_dim,
    recall_vs_parameters,
)
from workbench.figures.training import loss_curve, recall_per_epoch, training_rates
