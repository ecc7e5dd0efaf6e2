"""The same seed gives the same batches, whatever number of threads and of worker processes makes them."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from sagelib.graph import GeoVisualGraph
from sagelib.images import TrainTransform, loader
from sagelib.places import open_training_set
from sagelib.sampler import CliqueSampler, SamplerConfig

CONFIG = SamplerConfig(
    places_per_batch=2, images_per_place=2, similar_places=3, min_clique=2, batches_per_epoch=3
)


def made(places, threads: int, workers: int) -> tuple[list, torch.Tensor]:
    """An epoch's batches from given descriptors, and their pictures, augmented."""
    values = np.random.default_rng(0).normal(size=(len(places), 64)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            graph = GeoVisualGraph.from_places(places, **CONFIG.graph_options())
            sampler = CliqueSampler(graph, CONFIG)
            sampler.refresh(0, lambda images: values[images])
            sampler.set_epoch(0)
            plan = [[int(image) for image in batch] for batch in sampler]
            transform = TrainTransform(32, randaugment=2, seed=1)
            batches = [images for images, _ in loader(places, transform, batches=plan, workers=workers)]
    finally:
        torch.set_num_threads(before)
    return plan, torch.cat(batches)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_threads_and_workers_change_no_batch(small_town):
    places = open_training_set(small_town.parent, small_town.name)
    (plan, pictures), (other_plan, other_pictures) = (made(places, *how) for how in ((1, 0), (2, 4)))
    assert len(plan) == CONFIG.batches_per_epoch and plan == other_plan
    assert torch.equal(pictures, other_pictures)
