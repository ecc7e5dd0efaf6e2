"""A folder of rendered towns that any tool of the field reads: the default data set of the notebooks."""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import joblib
import numpy as np
from tqdm.auto import tqdm

from sagelib.runs import check, read_json, write_json
from townscape.plan import SEED_RANGES, UTM_LETTER, UTM_ZONE, Plan, Shot, TownConfig, plan_shots
from townscape.render import PICTURE_SIZE, Town, render_files

DEFAULT_SEEDS = {"train": range(1000, 1020), "val": range(1100, 1104), "test": range(1118, 1126)}
"""Towns of the default data set of :func:`ensure_town`."""

TRAIN_IMAGES_PER_TOWN, IMAGES_PER_TOWN = 360, 120
"""Training pictures, and references and as many queries, of each town of the default data set."""

PICTURE_VERSION = 6  # raised whenever the same seed gives other pictures: part of a folder's settings
JPEG_QUALITY = 92


def images_of(settings: dict, split: str) -> int | None:
    """How many pictures each town of a split has, by the folder's ``settings.json``; None: every pose."""
    few = settings.get("train_images_per_town") if split == "train" else None
    return few or settings["images_per_town"]


def shots_of(settings: dict) -> list[tuple[int, Shot]]:
    """All pictures of a folder, each with the seed of its town, town by town."""
    config, kinds = TownConfig(**settings["config"]), {"train": ("database",)}
    return [
        (seed, shot)
        for split in ("train", "val", "test")
        for seed in settings["seeds"][split]
        for kind in kinds.get(split, ("database", "queries"))
        for shot in plan_shots(Plan(seed, config), f"{split}/{kind}", images_of(settings, split))
    ]


def town_labels(folder: str | os.PathLike, paths: Iterable[str]) -> np.ndarray:
    """What each pixel of n pictures of the towns in `folder` shows: (n, H, W) indices into `plan.LABELS`.

    The pictures are planned and rendered once more: light and weather never change their geometry.
    """
    settings = read_json(Path(folder) / "settings.json")
    planned = {(shot.part, shot.name): (seed, shot) for seed, shot in shots_of(settings)}
    towns, labels = {}, []
    for path in map(Path, paths):
        key = "/".join(path.parts[-3:-1]), path.name
        if key not in planned:
            raise ValueError(f"{path} is no picture of the town in {folder}")
        seed, shot = planned[key]
        if seed not in towns:
            towns[seed] = Town(seed, TownConfig(**settings["config"]))
        view = {"year": shot.year, "visit": shot.visit, "labels": True}
        labels.append(towns[seed].render(shot.pose, shot.condition, settings["size"], **view)[1])
    return np.stack(labels)


def write_town(
    folder: str | os.PathLike,
    *,
    train_seeds: Iterable[int] = (1000, 1001),
    val_seeds: Iterable[int] = (1100,),
    test_seeds: Iterable[int] = (1110,),
    images_per_town: int | None = None,
    train_images_per_town: int | None = None,
    size: int = PICTURE_SIZE,
    config: TownConfig | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Render towns into a folder that any tool of the field reads.

    ``<folder>/images/train/database`` and ``<folder>/images/{val,test}/{database,queries}`` are filled with
    files
    ``@UTM_east@UTM_north@zone@letter@lat@lon@pano_id@tile@heading@pitch@roll@height@timestamp@note@.jpg``;
    the note is ``town<seed>-<condition>``. Every file appears whole or not at all, a killed run continues
    where it stopped, and ``manifest.json`` comes last: with it, a second call returns at once.

    Parameters
    ----------
    folder : path
    train_seeds, val_seeds, test_seeds : iterable of int
        Towns of each split, from :data:`SEED_RANGES`; may be empty.
    images_per_town : int, optional
        References (or training pictures), and as many queries, of each town: the first so many along the
        streets; None takes every pose, about 1,100 a training town and 390 + 390 a test town.
    train_images_per_town : int, optional
        The same for the training towns alone, where it goes before `images_per_town`.
    size : int
        Pixels a side.
    config : TownConfig, optional
        Size and difficulty of the towns.
    workers : int
        Processes that render (joblib's: `joblib.parallel_config` spreads them over a cluster).
    progress : bool
        Show a bar.

    Raises
    ------
    ValueError
        For a seed outside its range, and for a folder that holds anything but this town.
    """
    folder, config = Path(folder), config or TownConfig()
    seeds = {"train": train_seeds, "val": val_seeds, "test": test_seeds}
    for split, allowed in SEED_RANGES.items():
        low, high = allowed.start, allowed.stop - 1
        seeds[split] = [int(check(f"{split}_seeds", s, low, high, whole=True)) for s in seeds[split]]
        if len(set(seeds[split])) < len(seeds[split]):
            raise ValueError(f"{split}_seeds names a town twice: {seeds[split]}")
    check("size", size, 16, 2048, whole=True)
    check("workers", workers, 1, whole=True)
    check("images_per_town", images_per_town, 1, whole=True, none=True)
    check("train_images_per_town", train_images_per_town, 1, whole=True, none=True)
    settings = {
        "picture_version": PICTURE_VERSION,
        "seeds": seeds,
        "images_per_town": images_per_town,
        "size": int(size),
        "quality": JPEG_QUALITY,
        "config": {**asdict(config), "query_conditions": list(config.query_conditions)},
    }
    if train_images_per_town is not None:  # folders written without it stay as they are
        settings["train_images_per_town"] = train_images_per_town
    plan, manifest = folder / "settings.json", folder / "manifest.json"
    if plan.exists():
        found = read_json(plan)
        differing = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        if differing:
            raise ValueError(
                f"{folder} holds a town with other settings ({', '.join(differing)} differ): "
                "name another folder, or delete this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no town: name another folder")
    else:
        write_json(plan, settings)
    shots = [(seed, shot, folder / "images" / shot.part / shot.name) for seed, shot in shots_of(settings)]
    present = set()
    for part in {path.parent for _, _, path in shots}:
        part.mkdir(parents=True, exist_ok=True)
        present |= {entry.path for entry in os.scandir(part)}
    for left in (path for path in present if Path(path).name.startswith(".tmp-")):
        os.unlink(left)
    missing = [job for job in shots if str(job[2]) not in present]
    if not missing and manifest.exists():
        return folder
    started = time.perf_counter()
    # runs of pictures short enough for all workers, long enough that few walls are painted by two of them
    step = max(min(len(missing) // (4 * workers), IMAGES_PER_TOWN), 1)
    runs = [missing[i : i + step] for i in range(0, len(missing), step)]
    render = joblib.delayed(render_files)
    written = joblib.Parallel(min(workers, len(runs) or 1), return_as="generator_unordered", batch_size=1)(
        render(run, config, size, JPEG_QUALITY) for run in runs
    )
    with tqdm(
        total=len(missing), desc=f"rendering {folder.name}", unit="picture", disable=not progress
    ) as bar:
        for count in written:
            bar.update(count)
    totals = {"pictures": len(shots), "rendered_now": len(missing)}
    totals["seconds"] = round(time.perf_counter() - started, 2)
    zone = f"{UTM_ZONE}{UTM_LETTER} (a mock: the towns lie nowhere)"
    write_json(manifest, {**settings, **totals, "utm_zone": zone})
    return folder


def ensure_town(data_folder, name: str, *, images=None, spacing_m: float = 4.0, progress=False) -> Path:
    """The folder ``data_folder/name``, rendered first if `name` starts with ``town`` and it is not there yet.

    Notebooks call this so that their default data set needs no download; any other name is left to its owner.

    Parameters
    ----------
    data_folder : path
    name : str
    images : int, optional
        ``images_per_town`` of :func:`write_town`, with its two training towns, one for validation and one for
        test. None or 0: the towns of ``DEFAULT_SEEDS``, with ``TRAIN_IMAGES_PER_TOWN`` or ``IMAGES_PER_TOWN``
        pictures each; what is learned on few towns does not carry over to another.
    spacing_m : float
        Between training stations: half of it gives the same streets twice as many pictures.
    progress : bool
        Show a bar.

    Raises
    ------
    FileNotFoundError
        If there is no folder `data_folder`: a town is never rendered into a misspelt one.
    """
    folder = Path(data_folder) / name
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.parent.absolute()} to find or render {name} in")
    if name.startswith("town"):
        options = {
            "config": TownConfig(train_spacing_m=spacing_m),
            "images_per_town": images or IMAGES_PER_TOWN,
        }
        if not images:
            options |= {f"{split}_seeds": seeds for split, seeds in DEFAULT_SEEDS.items()}
            options["train_images_per_town"] = round(TRAIN_IMAGES_PER_TOWN * 4.0 / spacing_m)
        write_town(folder, **options, workers=joblib.cpu_count(), progress=progress)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m townscape.folder data/town``."""
    what = "Render the default set of towns, or go on with it."
    parser = argparse.ArgumentParser(prog="python -m townscape.folder", description=what)
    parser.add_argument("folder", type=Path, help="its name starts with town")
    parser.add_argument("--images", type=int, help="so many pictures of each of four towns instead")
    parser.add_argument("--spacing", type=float, default=4.0, help="metres between training stations")
    options = parser.parse_args(arguments)
    if not options.folder.name.startswith("town"):
        parser.error(f"the name of the folder must start with town, got {options.folder.name}")
    path = Path(os.path.abspath(options.folder))
    try:
        ensure_town(path.parent, path.name, images=options.images, spacing_m=options.spacing, progress=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
