"""Ask images for their month, hour, scale, country and place.

    python -m experiments.ask runs/satmips
    python -m experiments.ask runs/satmips --places map.png    # and where it places six of them

A test image is compared with a gallery of metadata that vary one field alone, all others missing:
the field's values in the training split. Similarities times the model's scale give, by softmax, a
posterior over the gallery. Probabilities of all values with the same answer, say July, are summed,
so answers that are frequent in training are favoured. Asked are the paper's fields timestamp, gsd,
country_code and location, not others of one's own.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from evaluate import Pretrained, extract
from experiments.common import (
    Splits, arguments, embed, great_circle, metadata_features, needs_metadata, open_run, spread,
    unit_sphere,
)  # fmt: skip
from experiments.pictures import places
from experiments.results import append, markdown, model_name, percent
from metadata import FIELDS, TIME_PARTS, BadInput, parse_category, parse_numbers, parse_timestamp

FIELD = {"month": "timestamp", "hour": "timestamp", "gsd": "gsd", "country": "country_code",
         "place": "location"}  # fmt: skip
GALLERY = 4096  # rows at most


def answer(question: str, value: object) -> object:
    """What a field's value says to the question, None when it does not say. A scale is answered by
    the power of two next to it, the mean of x and y."""
    if question in TIME_PARTS:
        parts = parse_timestamp(value) or [np.nan] * len(TIME_PARTS)
        number = parts[TIME_PARTS.index(question)]
        return None if np.isnan(number) else int(number)
    if question == "country":
        return parse_category(value)
    numbers = parse_numbers(value, FIELDS[FIELD[question]])
    if numbers is None:
        return None
    if question == "gsd":
        return 2.0 ** round(np.log2(np.mean(numbers)))
    return tuple(numbers)


@torch.no_grad()
def posterior(p: Pretrained, question: str, values: list, images: Tensor) -> tuple[list, Tensor]:
    """Answers of a gallery of values -> the answers, and their probabilities [m, C] given the
    images [m, E]."""
    gallery = metadata_features(p, [{FIELD[question]: value} for value in values])
    gallery = embed(p, {"metadata": gallery})["metadata"]
    answers = [answer(question, value) for value in values]
    classes = sorted(set(answers))
    number = {value: i for i, value in enumerate(classes)}
    codes = torch.tensor([number[value] for value in answers], device=gallery.device)
    sums = torch.zeros(len(images), len(classes), device=gallery.device)
    for part, x in zip(sums.split(1024), images.split(1024)):
        part.index_add_(1, codes, (p.model.logit_scale.exp() * x @ gallery.T).softmax(dim=1))
    return classes, sums


def ask(p: Pretrained, splits: Splits, images: Tensor, question: str) -> dict | None:
    """The likeliest answers of test images [m, E] -> scores; None when nothing is known. Beside
    them `chance`, without a look at the image: training's commonest answer, or any of its places.
    """
    train, test = (split.columns(FIELD[question])[0] for split in splits)
    values = spread([v for v in train if answer(question, v) is not None], GALLERY)
    truths = {}
    for i, value in enumerate(test):
        truth = answer(question, value)
        if truth is not None:
            truths[i] = truth
    if not values or not truths:
        return None
    classes, probabilities = posterior(p, question, values, images[list(truths)])
    said = [classes[i] for i in probabilities.argmax(dim=1).tolist()]
    answers = [answer(question, value) for value in values]
    result = {"features": "image", "label": question, "protocol": "ask", "test": len(truths)}
    if question == "place":
        rows = np.floor(data.uniform(0, np.arange(len(truths))) * len(answers)).astype(int)
        true = unit_sphere(list(truths.values()))
        blind = unit_sphere([answers[i] for i in rows])
        result["median_km"] = great_circle(unit_sphere(said), true).median().item()
        return result | {"chance": great_circle(blind, true).median().item()}
    common = Counter(answers).most_common(1)[0][0]
    hits = [a == b for a, b in zip(said, truths.values())]
    chance = [common == b for b in truths.values()]
    result |= {"accuracy": float(np.mean(hits)), "chance": float(np.mean(chance))}
    return result | {"classes": len(classes)}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--places", type=Path, help="also a picture (.png) of where it places some")
    args = parser.parse_args(argv)
    lines = [["model", "asked for", "right", "without looking", "answers", "test images"]]
    with data.errors_in_one_line():
        for run in args.run:
            p, splits = open_run(run, args)
            needs_metadata(p, splits)
            images = embed(p, {"image": extract(p, splits[1], args.workers)["image"]})["image"]
            known = [field.name for field in p.reader.fields]
            others = ", ".join(name for name in known if name not in FIELD.values())
            if others:
                asked = ", ".join(sorted(set(FIELD.values())))
                print(f"{run}: not asked for {others}; fields that can be asked: {asked}")
            for question in (q for q, field in FIELD.items() if field in known):
                r = ask(p, splits, images, question)
                if r is None:
                    continue
                append(args.output, [p.about | r])
                right = f"{r.get('median_km', 0):,.0f} km off (median)"
                chance = f"any training place: {r['chance']:,.0f} km"
                if question != "place":
                    right = percent(r["accuracy"]) + " %"
                    chance = f"always the commonest: {percent(r['chance'])} %"
                name = f"{model_name(p.about | r)}, seed {p.about.get('seed')}"
                count = str(r.get("classes", "places"))
                lines.append([name, question, right, chance, count, f"{r['test']:,}"])
            if args.places and not places(p, splits, args.workers, args.places):
                raise BadInput(f"--places: {run} reads no location, or {splits[1].path} has none")
        if len(lines) == 1:
            raise BadInput(f"no row has any of {', '.join(sorted(set(FIELD.values())))} to ask for")
        print(markdown(lines))


if __name__ == "__main__":
    main()
