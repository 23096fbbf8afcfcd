"""Two pictures of a dataset: training images with their captions (Table S3), and how the values of
each field are distributed (Figures S1 to S3).

    pip install matplotlib && python -m prepare.show DIR PICTURES

Writes PICTURES/samples.png and PICTURES/distributions.png.
"""

import argparse
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data import Split, choose_fields, errors_in_one_line, label_names, load_image, read_dataset
from metadata import TIME_PARTS, Field, caption, default_tokenizer
from metadata import parse_category, parse_numbers, parse_timestamp
from prepare.sources import need

MAP = Path(__file__).parents[1] / "demo/bluemarble-2004-07.jpg"


def canvas(rows: int, columns: int, width: float, height: float, **options):
    """-> a figure and its axes [rows, columns], drawn to a file, never to a screen."""
    need("matplotlib").rcParams["text.parse_math"] = False  # a $ in a label is a $
    figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    figure.savefig(unfinished, dpi=110, format="png")
    print(f"wrote {unfinished.replace(path)}")


def draw_samples(split: Split, fields: tuple[Field, ...], output: Path) -> None:
    """Twelve rows at equal distances: labels, caption, its tokens, image."""
    figure, axes = canvas(3, 4, 15, 14)
    rows = np.linspace(0, len(split) - 1, min(12, len(split))).astype(int).tolist()
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows):
        record = split[row]
        text = caption(record, fields)
        tokens = len(default_tokenizer().encode(text))  # without start and end, as in Table S3
        title = [f"row {row + 1}, {tokens} tokens"]
        for label in label_names([record]):
            title += textwrap.wrap(f"{label}: {record[label]}", 41)
        axis.set_title("\n".join(title + textwrap.wrap(text, 41)), fontsize=9, loc="left")
        axis.imshow(load_image(split.folder / record["file_name"], 224))
    figure.suptitle(f"{split.folder}: {len(rows)} of {len(split):,} images, labels and captions")
    save(figure, output)


def columns_of(split: Split, field: Field) -> dict[str, list]:
    """Title -> what can be read of each row's value; a time has three columns."""
    (values,) = split.columns(field.name)
    if field.kind == "category":
        return {field.name: [parse_category(value) for value in values]}
    if field.kind == "number":
        return {field.name: [parse_numbers(value, field) for value in values]}
    times = [parse_timestamp(value) or [np.nan] * len(TIME_PARTS) for value in values]
    parts = dict(zip(TIME_PARTS, zip(*times)))
    return {f"{field.name}, {part}": list(parts[part]) for part in ("year", "month", "weekday")}


def draw(axis, values: list, field: Field) -> None:
    """Places on a map, other numbers as a line for each component, else a bar for each value."""
    if field.kind != "number":
        counts = sorted(Counter(values).most_common(20))
        names = [value if isinstance(value, str) else f"{value:.0f}" for value, _ in counts]
        axis.bar(names, [count for _, count in counts])
        axis.tick_params("x", rotation=90 if len("".join(names)) > 50 else 0)
        return
    numbers = np.array(values)
    if field.parts == ("longitude", "latitude"):
        extent = (-180, 180, -90, 90)
        earth = Image.open(MAP).resize((1440, 720)).convert("L")
        axis.imshow(earth, extent=extent, aspect="auto", cmap="gray", alpha=0.5)
        size = np.clip(20_000 / len(numbers), 0.3, 30)
        axis.scatter(*numbers.T, s=size, color="tab:red", linewidths=0)
        axis.set(xlim=extent[:2], ylim=extent[2:], xlabel="longitude", ylabel="latitude")
        return
    edges = np.linspace(numbers.min(), numbers.max(), 60)
    if 0 < 10 * numbers.min() < numbers.max():
        edges = np.geomspace(numbers.min(), numbers.max(), 60)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    for i, column in enumerate(numbers.T):
        low, middle, high = np.quantile(column, (0, 0.5, 1))
        label = f"{low:,.5g} to {high:,.5g}, median {middle:,.5g}"
        if field.parts:
            label = f"{field.parts[i]}: {label}"
        axis.hist(column, edges, histtype="step", label=label, linestyle="-:"[i % 2], lw=2)
    axis.set_xlabel(field.unit)
    axis.legend()


def draw_distributions(split: Split, fields: tuple[Field, ...], output: Path) -> None:
    """A panel for each column of which something can be read; its title says how much."""
    panels = []
    for field in fields:
        for title, values in columns_of(split, field).items():
            known = [value for value in values if value is not None and value == value]
            if known:
                panels.append((f"{title}: {len(known):,} of {len(split):,} images", known, field))
    if not panels:
        print(f"{split.path}: no field can be read, so {output.name} is not drawn")
        return
    rows = (len(panels) + 1) // 2
    figure, axes = canvas(rows, 2, 14, 4.5 * rows)
    axes[-1, -1].set_visible(len(panels) % 2 == 0)
    for axis, (title, known, field) in zip(axes.flat, panels):
        axis.set(title=title, ylabel="images")
        draw(axis, known, field)
    save(figure, output)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a prepared dataset")
    parser.add_argument("pictures", type=Path, help="folder for the two pictures")
    parser.add_argument("--fields", default="", help="names (default: the dataset's)")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        train, _ = read_dataset(args.folder)
        fields = choose_fields(args.folder, args.fields)
        draw_samples(train, fields, args.pictures / "samples.png")
        draw_distributions(train, fields, args.pictures / "distributions.png")


if __name__ == "__main__":
    main()
