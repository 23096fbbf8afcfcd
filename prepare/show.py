"""Two pictures of a dataset: training images with their captions (Table S3), and how ground sample
distance, time and place are distributed (Figures S1 to S3).

    pip install matplotlib && python -m prepare.show DIR PICTURES

Writes PICTURES/samples.png and PICTURES/distributions.png.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from data import Split, choose_fields, errors_in_one_line, load_image, read_dataset
from metadata import FIELDS, caption, default_tokenizer, table_rows
from prepare.sources import need

MAP = Path(__file__).parents[1] / "demo/bluemarble-2004-07.jpg"
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


def canvas(rows: int, columns: int, width: float, height: float):
    """-> a figure and its axes [rows, columns], drawn to a file, never to a screen."""
    need("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    figure.savefig(unfinished, dpi=110, format="png")
    print(f"wrote {unfinished.replace(path)}")


def draw_samples(split: Split, names: str, output: Path) -> None:
    """Twelve rows at equal distances: labels, caption, its tokens, image."""
    fields, tokenize = choose_fields(split.folder.parent, names), default_tokenizer()
    figure, axes = canvas(3, 4, 15, 14)
    rows = np.linspace(0, len(split) - 1, min(12, len(split))).astype(int)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows.tolist()):
        record = split[row]
        text = caption(record, fields)
        title = [f"row {row + 1}, {len(tokenize(text))} tokens"]
        for key, value in record.items():
            if key.startswith("label"):
                title += textwrap.wrap(f"{key}: {value}", 41)
        axis.set_title("\n".join(title + textwrap.wrap(text, 41)), fontsize=9, loc="left")
        axis.imshow(load_image(split.folder / record["file_name"], 224))
    figure.suptitle(f"{split.folder}: {len(rows)} of {len(split):,} images, labels and captions")
    save(figure, output)


def draw_distributions(split: Split, output: Path) -> None:
    """Missing and malformed values are left out; each title says how many rows that leaves."""
    numbers, _ = table_rows(split, [FIELDS[name] for name in ("gsd", "timestamp", "location")])
    figure, axes = canvas(2, 2, 14, 9)
    titles = ("ground sample distance (m per pixel)", "place", "year", "month")
    columns, found = (slice(0, 2), slice(7, 9), slice(2, 3), slice(3, 4)), []
    for axis, title, column in zip(axes.flat, titles, columns):
        values = numbers[:, column]
        found.append(values[~np.isnan(values).any(1)])
        axis.set_title(f"{title}: {len(found[-1]):,} of {len(split):,} images")
        axis.set_ylabel("images")
        axis.set_visible(len(found[-1]) > 0 or title == "place")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.get_major_locator().set_params(integer=True)
    gsd, places, years, months = found
    if len(gsd):
        edges = np.geomspace(gsd.min() / 1.01, gsd.max() * 1.01, 60)
        for values, name, line in zip(gsd.T, "xy", "-:"):
            low, middle, high = np.quantile(values, (0, 0.5, 1))
            label = f"{name}: {low:.2f} to {high:.2f}, median {middle:.2f}"
            axes[0, 0].hist(values, edges, histtype="step", label=label, linestyle=line, lw=2)
        axes[0, 0].set_xscale("log")
        ticks = np.unique(np.geomspace(gsd.min(), gsd.max(), 6))
        options = dict(precision=3, fractional=False, trim="-")  # three digits
        axes[0, 0].set_xticks(ticks, [np.format_float_positional(t, **options) for t in ticks])
        axes[0, 0].minorticks_off()
        axes[0, 0].legend()
    earth = Image.open(MAP).resize((1440, 720)).convert("L")
    extent = (-180, 180, -90, 90)
    axes[0, 1].imshow(earth, extent=extent, aspect="auto", cmap="gray", alpha=0.5)
    size = np.clip(20_000 / max(1, len(places)), 0.3, 30)
    axes[0, 1].scatter(*places.T, s=size, color="tab:red", linewidths=0)
    axes[0, 1].set(xlim=extent[:2], ylim=extent[2:], xlabel="longitude", ylabel="latitude")
    if len(years):
        axes[1, 0].bar(*np.unique(years, return_counts=True))
        first, last = years.min(), years.max()
        margin = max(1, 3 - (last - first) / 2)
        ticks = np.arange(first, last + 1, 1 + (last - first) // 12)
        axes[1, 0].set(xticks=ticks, xlim=(first - margin, last + margin))
    axes[1, 1].bar(*np.unique(months, return_counts=True))
    axes[1, 1].set(xlim=(0.4, 12.6), xticks=range(1, 13), xticklabels=MONTHS)
    save(figure, output)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a prepared dataset")
    parser.add_argument("pictures", type=Path, help="folder for the two pictures")
    parser.add_argument("--fields", default="", help="of the captions (default: the dataset's)")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        train, _ = read_dataset(args.folder)
        draw_samples(train, args.fields, args.pictures / "samples.png")
        draw_distributions(train, args.pictures / "distributions.png")


if __name__ == "__main__":
    main()
