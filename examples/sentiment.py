"""Movie reviews with a sentiment, from the source distribution of vaderSentiment, as one labelled file.

    pip download --no-deps --no-binary :all: vaderSentiment==2.5 --dest downloads
    python examples/sentiment.py downloads/vaderSentiment-2.5.tar.gz runs/sentiment-data/reviews.jsonl

Its archive of Hutto and Gilbert (ICWSM 2014) rates 10,605 snippets of film reviews (Pang and Lee 2004) from -4 to +4,
the mean of twenty people. Ratings above +0.5 become "positive", those below -0.5 "negative", the rest is left out.
`hotloop finetune recipes/sentiment.toml` draws training, validation and test from the file.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def read(archive: Path) -> str:
    """The rated snippets inside the archive inside the archive; nothing is unpacked to disk."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as resources:
            snippets = resources.extractfile(SNIPPETS)
            assert snippets is not None
            return snippets.read().decode("utf-8")


def main(archive: str, out: str) -> None:
    path = Path(out)
    if path.exists():
        sys.exit(f"{path} exists: remove it, or name another file")
    rows = []
    for line in read(Path(archive)).splitlines():
        number, rating, text = line.split("\t")
        if text.strip() and abs(float(rating)) > 0.5:
            label = "positive" if float(rating) > 0 else "negative"
            rows.append({"id": int(number), "text": text.strip(), "label": label})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} reviews")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
