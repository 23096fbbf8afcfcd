"""Two pictures of a run: nearest neighbours of test images, and where on Earth it places them.

    python -m experiments.pictures runs/satmips            # neighbours.png and places.png beside it
    python -m experiments.pictures runs/satmips --label label_land_cover

Both use features of images; places.png needs a metadata encoder and images with a location.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from evaluate import Pretrained, extract
from experiments.common import (
    Rows, Splits, arguments, embed, location, metadata_features, nearest_km, open_run, spread,
    unit_sphere,
)  # fmt: skip
from experiments.results import class_name
from metadata import BadInput
from prepare.show import canvas, save
from prepare.sources import need

EARTH = Path(__file__).parents[1] / "demo" / "bluemarble-2004-07.jpg"
KOPPEN = {  # Köppen's codes of climates, as in the demo data
    "Af": "tropical rainforest", "Am": "tropical monsoon", "As": "savanna, dry summer",
    "Aw": "savanna, dry winter", "BSh": "hot steppe", "BSk": "cold steppe", "BWh": "hot desert",
    "BWk": "cold desert", "Cfa": "humid subtropical", "Cfb": "oceanic", "Cfc": "subpolar oceanic",
    "Csa": "hot-summer Mediterranean", "Csb": "warm-summer Mediterranean",
    "Csc": "cold-summer Mediterranean", "Cwa": "subtropical, dry winter",
    "Cwb": "highland, dry winter", "Cwc": "cold highland, dry winter",
    "Dfa": "continental, hot summer", "Dfb": "continental, warm summer", "Dfc": "subarctic",
    "Dfd": "subarctic, severe winter", "Dsa": "continental, hot dry summer",
    "Dsb": "continental, warm dry summer", "Dsc": "subarctic, dry summer",
    "Dsd": "subarctic, severe winter, dry summer", "Dwa": "continental, hot summer, dry winter",
    "Dwb": "continental, warm summer, dry winter", "Dwc": "subarctic, dry winter",
    "Dwd": "subarctic, severe dry winter", "EF": "ice cap", "ET": "tundra",
}  # fmt: skip
BANK, SHOWN, NEIGHBOURS, PIXELS = 5000, 6, 6, 96
GREEN, RED, GRAY = "#1a9850", "#d73027", "#bbbbbb"
WORLD = (-180, 180, -60, 75)  # degrees west, east, south, north of a map; its grid is 72 x 27
FADE = (500, 1500)  # km from the nearest training place, over which the likelihood fades out


def spell(name: str, width: int = 24) -> str:
    """A class as a reader knows it, in two lines at most."""
    text = name.replace("_", " ")
    if name in KOPPEN:
        text = f"{name}, {KOPPEN[name]}"
    return "\n".join(textwrap.wrap(text, width, max_lines=2, placeholder=" …"))


def neighbours(p: Pretrained, splits: Splits, label: str, workers: int, path: Path) -> None:
    """Labelled test images, each with its nearest training images by image features."""
    train, test = splits
    train_names, test_names = (split.columns(label)[0] for split in splits)
    chosen = spread([i for i, name in enumerate(test_names) if name is not None], SHOWN)
    if not chosen:
        return print(f"{test.path}: no {label}, no {path.name}")
    bank = Rows(train, spread(list(range(len(train))), BANK))
    x = F.normalize(extract(p, bank, workers)["image"], dim=1)
    queries = F.normalize(extract(p, Rows(test, chosen), workers)["image"], dim=1)
    nearest = (queries @ x.T).topk(min(NEIGHBOURS, len(bank))).indices.tolist()
    columns, rows = 1 + len(nearest[0]), len(chosen)
    figure, axes = canvas(rows, columns, 1.45 * columns, 1.72 * rows + 1)
    for row, found, query in zip(axes, nearest, chosen):
        truth = test_names[query]
        draw(row[0], test, query, truth, "black")
        for axis, i in zip(row[1:], found):
            name, colour = train_names[bank.indices[i]], RED
            if name is None:
                colour = GRAY
            elif str(name) == str(truth):
                colour = GREEN
            draw(axis, train, bank.indices[i], name, colour)
    frames = {"black": "test image", GREEN: "neighbour of its class", RED: "of another class"}
    frames[GRAY] = "without a label"
    marks = [axes[0, 0].plot([], color=c, linewidth=4)[0] for c in frames]
    outside = {"loc": "outside lower center", "frameon": False}
    figure.legend(marks, frames.values(), ncols=4, fontsize=9, **outside)
    figure.suptitle(
        f"Test images and their nearest of {len(bank):,} training images, most similar first\n"
        f"by cosine of image features; with their {class_name(label)}", fontsize=10,
    )  # fmt: skip
    save(figure, path)


def draw(axis, split, i: int, name: object, colour: str) -> None:
    """One image in a frame, its class above."""
    axis.imshow(data.load_image(split.folder / split[i]["file_name"], PIXELS))
    axis.set_title("no label" if name is None else spell(str(name)), fontsize=7, pad=3)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=3)


def window(known: list[list[float]]) -> tuple[float, float, float, float]:
    """What the maps show: the world, or twice the region in which all places are."""
    (west, south), (east, north) = np.min(known, axis=0), np.max(known, axis=0)
    half = max(east - west, (north - south) * 360 / 135, 0.5)
    x, y, high = (west + east) / 2, (south + north) / 2, half * 135 / 360
    inside = abs(x) + half <= 180 and abs(y) + high <= 90
    return (x - half, x + half, y - high, y + high) if inside and half < 60 else WORLD


@torch.no_grad()
def places(p: Pretrained, splits: Splits, workers: int, path: Path) -> bool:
    """Each image's embedding beside that of its own metadata with the location replaced by every
    place of a grid -> whether the model reads locations, and a test image has one."""
    train, test = splits
    rows = spread(list(range(len(test))), 200)
    chosen = spread([i for i in rows if location(test[i])], SHOWN)
    known = [place for place in map(location, train) if place]
    if not chosen or not known or not any(f.name == "location" for f in p.reader.fields):
        return False
    west, east, south, north = window(known)
    x, y = np.linspace(west, east, 145)[1::2], np.linspace(north, south, 55)[1::2]
    grid = np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2).tolist()
    km = nearest_km(unit_sphere(grid), unit_sphere(known))
    near = 1 - ((km - FADE[0]) / (FADE[1] - FADE[0])).clamp(0, 1)
    asked = near.nonzero()[:, 0]
    image = extract(p, Rows(test, chosen), workers)["image"]
    dots = np.array(spread(known, 2000))
    height = 2.05 * len(chosen) + 1.4
    figure, axes = canvas(len(chosen), 2, 8.6, height, width_ratios=(1, 2.7))
    earth = Image.open(EARTH)
    box = np.array([west + 180, 90 - north, east + 180, 90 - south]) / 360 * earth.width
    earth = earth.resize((1080, 405), box=tuple(box))
    for (left, right), i, feature in zip(axes, chosen, image):
        record = test[i]
        varied = metadata_features(p, [record | {"location": grid[j]} for j in asked.tolist()])
        e = embed(p, {"image": feature[None], "metadata": varied})
        logits = (e["metadata"] @ e["image"][0] * p.model.logit_scale.exp()).cpu().double()
        share = torch.zeros(len(grid)).double()
        share[asked] = logits.softmax(0) * near[asked]
        share = (share / share.max()).view(len(y), -1).numpy()
        times = [f.name for f in p.reader.fields if f.kind == "timestamp" and f.name in record]
        date = record[times[0]] if times else "no date"
        if record.get("timestamp_inferred"):
            date += " (month inferred)"
        draw(left, test, i, date, "black")
        right.imshow(earth, extent=(west, east, south, north), alpha=0.6)
        right.plot(*dots.T, ".", color="black", markersize=1, alpha=0.4)
        colours = right.imshow(share, alpha=share**0.5, extent=(west, east, south, north),
                               cmap="autumn", vmin=0, vmax=1, interpolation="bilinear")  # fmt: skip
        look = {"color": "cyan", "markersize": 13, "markeredgecolor": "black"}
        (star,) = right.plot(*location(record), "*", **look)
        right.set(xlim=(west, east), ylim=(south, north), xticks=[], yticks=[])
    figure.suptitle(
        "Where the model places test images: likelihood of each place given the image,\n"
        "with the rest of the image's metadata", fontsize=10,
    )  # fmt: skip
    (training,), names = right.plot([], [], ".", color="black"), ("true place", "training places")
    figure.legend((star, training), names, loc="outside lower left", frameon=False, fontsize=9)
    bar = figure.colorbar(colours, ax=axes[:, 1].tolist(), location="bottom", aspect=40)
    bar.set_label(f"likelihood, relative to the row's maximum; faded beyond {FADE[0]} km from "
                  "training places", fontsize=8)  # fmt: skip
    save(figure, path)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, output=False)
    parser.add_argument("--label", help="whose classes to show (default: the first)")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        need("matplotlib")
        for run in args.run:
            p, splits = open_run(run, args)
            folder = Path(p.about["checkpoint"]).parent
            labels = data.label_names(splits[0])
            if args.label and args.label not in labels:
                raise BadInput(f"--label {args.label}: not one of {', '.join(labels)}")
            if labels:
                label = args.label or labels[0]
                neighbours(p, splits, label, args.workers, folder / "neighbours.png")
            drawn = p.reader and places(p, splits, args.workers, folder / "places.png")
            if not labels and not drawn:
                print(f"{folder}: neither labels nor places to draw")


if __name__ == "__main__":
    main()
