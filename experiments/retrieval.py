"""Retrieval in the joint space: from a test image to its metadata among all, and back.

    python -m experiments.retrieval runs/satmips --output retrieval.jsonl
"""

import torch
from torch import Tensor

import data
from evaluate import extract
from experiments.common import arguments, embed, needs_metadata, open_run
from experiments.results import append, markdown, model_name, percent

KS = (1, 5, 10)


def ranks(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """How many of all n gallery rows are more similar to query i than row i is [n], and how many
    others are as similar (images that share their metadata) [n]; both [n, E] unit vectors."""
    found, chunk = [], max(1, 2**26 // len(gallery))
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        equal = (similarity == own).sum(dim=1) - 1
        found.append(torch.stack([(similarity > own).sum(dim=1), equal]))
    above, equal = torch.cat(found, dim=1).double()
    return above, equal


def retrieval(embeddings: dict[str, Tensor]) -> list[dict]:
    """Both ways: share of rank at most k for each of KS, and the median rank, both as the mean over
    the orders of equally similar rows."""
    results = []
    for query, gallery in (("image", "metadata"), ("metadata", "image")):
        above, equal = ranks(embeddings[query], embeddings[gallery])
        result = {"features": f"{query} to {gallery}", "label": "own", "protocol": "retrieval"}
        for k in KS:
            result[f"recall_{k}"] = ((k - above) / (equal + 1)).clamp(0, 1).mean().item()
        median = (1 + above + equal / 2).median().item()
        results.append(result | {"median_rank": median, "test": len(above)})
    return results


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    lines = [["model", "from", *(f"recall@{k} (%)" for k in KS), "median rank", "among"]]
    with data.errors_in_one_line():
        for run in args.run:
            p, splits = open_run(run, args)
            needs_metadata(p, splits)
            found = retrieval(embed(p, extract(p, splits[1], args.workers)))
            append(args.output, [p.about | r for r in found])
            for r in found:
                recalls = [percent(r[f"recall_{k}"]) for k in KS]
                name = f"{model_name(p.about | r)}, seed {p.about.get('seed')}"
                median = f"{r['median_rank']:g}"
                lines.append([name, r["features"], *recalls, median, f"{r['test']:,}"])
        print(markdown(lines))


if __name__ == "__main__":
    main()
