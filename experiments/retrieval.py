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


def ranks(queries: Tensor, gallery: Tensor) -> Tensor:
    """Rank [n], from 1, of gallery row i among all n for query i; both [n, E] unit vectors.

    Of equal similarities (images that share their metadata) half are counted before: the mean over
    their orders.
    """
    found, chunk = [], max(1, 2**26 // len(gallery))
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        equal = (similarity == own).sum(dim=1) - 1
        found.append(1 + (similarity > own).sum(dim=1) + equal / 2)
    return torch.cat(found)


def retrieval(embeddings: dict[str, Tensor]) -> list[dict]:
    """Both ways: share of rank at most k for each of KS, and the median rank."""
    results = []
    for query, gallery in (("image", "metadata"), ("metadata", "image")):
        rank = ranks(embeddings[query], embeddings[gallery])
        result = {"features": f"{query} to {gallery}", "label": "own", "protocol": "retrieval"}
        for k in KS:
            result[f"recall_{k}"] = (rank <= k).double().mean().item()
        results.append(result | {"median_rank": rank.median().item(), "test": len(rank)})
    return results


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    lines = [["model", "from", *(f"recall@{k} (%)" for k in KS), "median rank", "among"]]
    with data.errors_in_one_line():
        for run in args.run:
            p, splits = open_run(run, args)
            needs_metadata(p)
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
